"""Pruning methods. Each file in this folder that defines a :class:`Method` registers it under the file's name."""

from __future__ import annotations

import importlib
import pkgutil

from .alps import ALPS
from .base import Layer, Method, Solution, drop, resolve_orders
from .dsnot import DSnoT
from .magnitude import Magnitude
from .oats import OATS
from .sparsegpt import SparseGPT
from .wanda import Wanda


def _discover() -> dict[str, type[Method]]:
    modules = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    classes = [(m.__name__.rpartition(".")[2], c) for m in modules for c in vars(m).values() if _is_method_of(c, m.__name__)]
    return dict(classes)


def _is_method_of(candidate: object, module: str) -> bool:
    return (
        isinstance(candidate, type)
        and issubclass(candidate, Method)
        and candidate is not Method
        and candidate.__module__ == module
    )


METHODS: dict[str, type[Method]] = _discover()
"""Methods by name, with those of installed packages once the settings are read."""

__all__ = [
    "ALPS",
    "METHODS",
    "OATS",
    "DSnoT",
    "Layer",
    "Magnitude",
    "Method",
    "Solution",
    "SparseGPT",
    "Wanda",
    "drop",
    "resolve_orders",
]
