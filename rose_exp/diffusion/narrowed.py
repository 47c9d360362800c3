"""Removal of masked attention heads and neurons from denoisers.

If the configuration of the denoiser's class can express the new sizes, the denoiser keeps its class. Otherwise, it becomes an
instance of a class of :mod:`rose_exp.diffusion.modeling_narrowed`, whose code is saved with the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

import diffusers
import torch
from torch import nn

from ..models import Structure, find_structures
from .modeling_narrowed import PREFIX, narrowed_class
from .sampling import denoiser_name

NEURONS = ("ffn_dim", "mlp_ratio", "intermediate_size")
"""Configuration entries that set the number of neurons of all FFNs, and nothing else."""

Layout = dict[str, dict[str, int]]
"""The integer attributes of each module, by name: sizes of layers, numbers of heads."""


def widths(denoiser: nn.Module, kinds: Collection[str] = ("heads", "neurons")) -> dict[str, int]:
    """Return the number of heads or neurons of each structure, by name and kind."""
    return {key_of(structure): structure.groups for structure in find_structures(denoiser, kinds=kinds)}


def remove_masked(pipeline: Any, counts: Mapping[str, int]) -> None:
    """Remove masked heads and neurons from the denoiser, whose outputs do not change.

    Args:
        counts: how many to remove from each structure, by name and kind.
    Raises:
        ValueError: a count exceeds the number of masked heads or neurons.
    """
    part = denoiser_name(pipeline)
    denoiser = getattr(pipeline, part)
    shrink(denoiser, counts)
    pipeline.register_modules(**{part: denoiser})  # updates the class that the pipeline saves


def shrink(denoiser: Any, counts: Mapping[str, int]) -> None:
    """Remove masked heads and neurons, and adapt the configuration of the denoiser. See :func:`remove_masked`."""
    for key, count in counts.items():
        _structure(denoiser, key).remove_masked(count)  # searched again, because structures may share a layer
    name = type(denoiser).__name__.removeprefix(PREFIX)
    config = {key: value for key, value in denoiser.config.items() if key != "narrowed" and not key.startswith("_")}
    original = _layout_of(name, config)
    entries = None if is_narrowed(denoiser) else _expressed(_layout(denoiser), original, name, config)
    if entries is None:
        denoiser.__class__ = narrowed_class(name)
        entries = {"narrowed": _sizes(denoiser, original)}
    denoiser.register_to_config(**entries)


def is_narrowed(denoiser: nn.Module) -> bool:
    """Return whether diffusers needs the code that is saved with a denoiser to load it."""
    return type(denoiser).__name__.startswith(PREFIX)


def key_of(structure: Structure) -> str:
    return f"{structure.name}/{structure.kind}"


def _expressed(layout: Layout, original: Layout, name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration entries with which the diffusers class ``name`` has a layout; None if there are none."""
    if layout == original:
        return {}
    changes = {
        Fraction(layout[module][key], value)
        for module, values in original.items()
        for key, value in values.items()
        if layout[module][key] != value
    }
    if len(changes) > 1:
        return None
    (ratio,) = changes
    for entry in NEURONS:
        value = config.get(entry)
        if not isinstance(value, (int, float)):
            continue
        exact = Fraction(value) * ratio
        changed = {entry: int(exact) if exact.denominator == 1 and isinstance(value, int) else float(exact)}
        if _layout_of(name, config | changed) == layout:
            return changed
    return None


def _layout_of(name: str, config: Mapping[str, Any]) -> Layout:
    """Return the layout of a diffusers class with a configuration; no weights are allocated."""
    with torch.device("meta"):
        return _layout(getattr(diffusers, name).from_config(dict(config)))


def _layout(model: nn.Module) -> Layout:
    return {
        name: {key: value for key, value in vars(module).items() if type(value) is int}
        for name, module in model.named_modules()
    }


def _sizes(denoiser: nn.Module, original: Layout) -> dict[str, Any]:
    """Return the sizes that differ, as :func:`rose_exp.diffusion.modeling_narrowed.narrow` takes them."""
    layers, attributes = {}, {}
    for name, values in _layout(denoiser).items():
        changed = {key: value for key, value in values.items() if value != original[name][key]}
        if changed and isinstance(denoiser.get_submodule(name), nn.Linear):
            layers[name] = (values["out_features"], values["in_features"])
        elif changed:
            attributes[name] = changed
    return {"layers": layers, "attributes": attributes}


def _structure(denoiser: nn.Module, key: str) -> Structure:
    structures = find_structures(denoiser, kinds=(key.rpartition("/")[2],))
    return next(structure for structure in structures if key_of(structure) == key)
