"""Denoisers with fewer attention heads and neurons than diffusers' configurations can express.

``NarrowedX`` is the diffusers class X with layers shrunk to the sizes in its configuration's entry ``narrowed``. diffusers can
load a saved pipeline with such a class once this module has been imported; ``import rose_exp.diffusion`` does that.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin  # noqa: F401  diffusers looks for loadable base classes here
from torch import nn

from ..models import Structure, find_structures
from .sampling import denoiser_name

PREFIX = "Narrowed"


def widths(denoiser: nn.Module, kinds: Collection[str] = ("heads", "neurons")) -> dict[str, int]:
    """Return the number of heads or neurons of each structure, by name and kind."""
    return {key_of(structure): structure.groups for structure in find_structures(denoiser, kinds=kinds)}


def narrow(denoiser: nn.Module, kept_counts: Mapping[str, int]) -> None:
    """Shrink structures to the numbers of heads or neurons in ``kept_counts``, by name and kind; weights do not matter.

    Raises:
        ValueError: a structure does not exist, or is smaller than its number in ``kept_counts``.
    """
    kinds = {key.rpartition("/")[2] for key in kept_counts}
    known = widths(denoiser, kinds)
    for key, count in kept_counts.items():
        if not 1 <= count <= known.get(key, 0):
            raise ValueError(f"narrowed.{key}: expected 1 to {known.get(key, 0)}, got {count}")
    for key in kept_counts:  # searched again each time, because structures may share a layer
        structure = _structure(denoiser, key)
        structure.keep(torch.arange(structure.groups) < kept_counts[key])


def remove_masked(pipeline: Any, counts: Mapping[str, int]) -> None:
    """Remove masked heads and neurons from the denoiser, which becomes an instance of a ``Narrowed`` class.

    The outputs of the denoiser do not change.

    Args:
        counts: how many to remove from each structure, by name and kind.
    Raises:
        ValueError: a count exceeds the number of masked heads or neurons.
    """
    part = denoiser_name(pipeline)
    denoiser = getattr(pipeline, part)
    for key, count in counts.items():
        _structure(denoiser, key).remove_masked(count)  # searched again, because structures may share a layer
    if not type(denoiser).__name__.startswith(PREFIX):
        denoiser.__class__ = narrowed_class(type(denoiser).__name__)
    before = dict(denoiser.config.get("narrowed") or {})
    denoiser.register_to_config(narrowed=before | {key: _structure(denoiser, key).groups for key in counts})
    pipeline.register_modules(**{part: denoiser})  # updates the class that the pipeline saves


@cache
def narrowed_class(original: str) -> type:
    """Return the ``Narrowed`` class for the diffusers class named ``original``."""
    base = getattr(diffusers, original)

    def __init__(self, narrowed: dict[str, int] | None = None, **options: Any):  # noqa: N807
        base.__init__(self, **options)
        narrow(self, narrowed or {})
        self.register_to_config(narrowed=narrowed)

    parameters = list(inspect.signature(base.__init__).parameters.values())
    parameter = inspect.Parameter("narrowed", inspect.Parameter.KEYWORD_ONLY, default=None)
    # diffusers derives the valid configuration entries from the signature
    __init__.__signature__ = inspect.Signature([*parameters, parameter])
    return type(f"{PREFIX}{original}", (base,), {"__init__": __init__, "__module__": __name__})


def key_of(structure: Structure) -> str:
    return f"{structure.name}/{structure.kind}"


def _structure(denoiser: nn.Module, key: str) -> Structure:
    structures = find_structures(denoiser, kinds=(key.rpartition("/")[2],))
    return next(structure for structure in structures if key_of(structure) == key)


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and hasattr(diffusers, name.removeprefix(PREFIX)):
        return narrowed_class(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
