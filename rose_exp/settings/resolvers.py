"""Resolvers for values of configuration files that depend on the sparsity pattern."""

from __future__ import annotations

from omegaconf import OmegaConf


def register_resolvers() -> None:
    """Register the resolvers.

    * ``${unstructured_else:PATTERN,A,B}`` is A for an unstructured pattern and else B.
    * ``${null_for_nm:PATTERN,A}`` is null for an N:M pattern, which implies its ratio, and else A.
    """
    OmegaConf.register_new_resolver("unstructured_else", lambda kind, a, b: a if kind == "unstructured" else b, replace=True)
    OmegaConf.register_new_resolver("null_for_nm", lambda kind, a: None if ":" in str(kind) else a, replace=True)
