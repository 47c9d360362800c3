"""Denoisers whose heads and neurons are fewer than their configuration can say: ``NarrowedX`` is diffusers' class X with its
layers made smaller as ``narrowed`` in its configuration says. diffusers loads a saved pipeline that names one once this module
has been imported, which ``import rose_exp.diffusion`` does."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin  # noqa: F401  diffusers looks here for what it knows how to load
from torch import nn

from ..models import Structure, find_structures
from .sampling import denoiser_name

PREFIX = "Narrowed"


def widths(denoiser: nn.Module, kinds: Collection[str] = ("heads", "neurons")) -> dict[str, int]:
    """Heads and neurons of each structure, by its name and kind."""
    return {key_of(structure): structure.groups for structure in find_structures(denoiser, kinds=kinds)}


def narrow(denoiser: nn.Module, wanted: Mapping[str, int]) -> None:
    """Make every structure as small as ``wanted`` says, whatever its weights are.

    Raises:
        ValueError: of a structure that is not there, or of more than there is.
    """
    kinds = {key.rpartition("/")[2] for key in wanted}
    known = widths(denoiser, kinds)
    for key, count in wanted.items():
        if not 1 <= count <= known.get(key, 0):
            raise ValueError(f"narrowed.{key}: expected 1 to {known.get(key, 0)}, got {count}")
    for key in wanted:  # found anew each time, since two may share a layer
        structure = _structure(denoiser, key)
        structure.keep(torch.arange(structure.groups) < wanted[key])


def remove_masked(pipeline: Any, counts: Mapping[str, int]) -> None:
    """Take out as many heads and neurons of each structure of the denoiser as ``counts`` says, by name and kind; they must be
    masked, so that no output changes. The denoiser becomes one of a ``Narrowed`` class.

    Raises:
        ValueError: more than are masked.
    """
    part = denoiser_name(pipeline)
    denoiser = getattr(pipeline, part)
    for key, count in counts.items():
        _structure(denoiser, key).remove_masked(count)  # found anew each time, since two may share a layer
    if not type(denoiser).__name__.startswith(PREFIX):
        denoiser.__class__ = narrowed_class(type(denoiser).__name__)
    before = dict(denoiser.config.get("narrowed") or {})
    denoiser.register_to_config(narrowed=before | {key: _structure(denoiser, key).groups for key in counts})
    pipeline.register_modules(**{part: denoiser})  # which notes its class


@cache
def narrowed_class(original: str) -> type:
    """The class of diffusers that is called ``original``, narrowed."""
    base = getattr(diffusers, original)

    def __init__(self, narrowed: dict[str, int] | None = None, **options: Any):  # noqa: N807
        base.__init__(self, **options)
        narrow(self, narrowed or {})
        self.register_to_config(narrowed=narrowed)

    parameters = list(inspect.signature(base.__init__).parameters.values())
    own = inspect.Parameter("narrowed", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = inspect.Signature([*parameters, own])  # diffusers reads from it what a configuration may hold
    return type(f"{PREFIX}{original}", (base,), {"__init__": __init__, "__module__": __name__})


def key_of(structure: Structure) -> str:
    return f"{structure.name}/{structure.kind}"


def _structure(denoiser: nn.Module, key: str) -> Structure:
    found = find_structures(denoiser, kinds=(key.rpartition("/")[2],))
    return next(structure for structure in found if key_of(structure) == key)


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and hasattr(diffusers, name.removeprefix(PREFIX)):
        return narrowed_class(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
