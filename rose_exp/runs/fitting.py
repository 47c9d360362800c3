"""The check whether a run fits into memory and on disk, and the choice of where its weights are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..models import ModelShape
from ..runtime.errors import RoseExpError
from ..settings.schema import Settings
from ..settings.section import changed
from .memory import Footprint, Placement, footprint


def choose(settings: Settings, shape: ModelShape, cuda: bool, available: Footprint) -> Placement:
    """Choose the placement: as the settings request; for ``auto``, in memory if it fits.

    If the moments of a block do not fit, such as those of many experts, at most as many bytes of them are kept at a time as the
    largest block has.
    """
    requested, by_blocks = settings.pipeline.weights, settings.pipeline.by_blocks
    weights = [requested] if requested != "auto" else ["memory", "disk"]
    by_blocks_choices = [by_blocks] if by_blocks != "auto" else [False, True]
    block = shape.largest * torch.finfo(shape.dtype).bits // 8
    limits = [None, block] if settings.pruned else [None]
    placements = [Placement(w, b or w == "disk", limit) for w in weights for b in by_blocks_choices for limit in limits]
    fitting = [p for p in placements if not footprint(settings, shape, cuda, p).over(available)]
    return (fitting or placements[-1:])[0]


def check_fits(settings: Settings, shape: ModelShape, cuda: bool, available: Footprint) -> tuple[Placement, Footprint]:
    """Return the placement of the weights and the estimated peak usage.

    Raises:
        RoseExpError: the estimate exceeds what is available. The message suggests settings with which the run fits.
    """
    placement = choose(settings, shape, cuda, available)
    estimate = footprint(settings, shape, cuda, placement)
    over = estimate.over(available)
    if not over or not settings.preflight:
        return placement, estimate
    suggestion = _suggestion(settings, shape, cuda, available)
    raise RoseExpError(
        f"{settings.model.name} does not fit ({' and '.join(over)}): the run needs {estimate}; available: {available}. "
        f"{suggestion}. preflight=false skips this check"
    )


def _suggestion(settings: Settings, shape: ModelShape, cuda: bool, available: Footprint) -> str:
    """Return a suggestion of settings with which the run fits. None of them is redundant."""
    changes: list[tuple[str, dict[str, Mapping[str, Any]]]] = []
    candidate = settings
    for name, value in (
        ("pipeline.weights", "disk"),
        ("pipeline.by_blocks", True),
        ("pipeline.activations", "host" if cuda else "disk"),
        ("pipeline.activations", "disk"),
        ("pipeline.batch", 1),
        ("evaluation.batch", 1),
        ("pipeline.resume", "recompute"),
        ("save", False),
    ):
        candidate = _changed(candidate, name, value)
        changes = [change for change in changes if change[0] != name] + [(name, value)]
        if not footprint(candidate, shape, cuda, choose(candidate, shape, cuda, available)).over(available):
            needed = [(n, v) for n, v in changes if not _fits_without(settings, changes, n, shape, cuda, available)]
            return "It would fit with " + " ".join(f"{n}={str(v).lower()}" for n, v in needed or changes)
    least = footprint(candidate, shape, cuda, choose(candidate, shape, cuda, available))
    return f"No settings with an equal result make it fit: they need at least {least}. Reduce calibration.samples"


def _fits_without(settings, changes, left_out: str, shape: ModelShape, cuda: bool, available: Footprint) -> bool:
    for name, value in changes:
        if name != left_out:
            settings = _changed(settings, name, value)
    return not footprint(settings, shape, cuda, choose(settings, shape, cuda, available)).over(available)


def _changed(settings: Settings, name: str, value: Any) -> Settings:
    section, _, key = name.rpartition(".")
    if not section:
        return settings.model_copy(update={key: value})
    return settings.model_copy(update={section: changed(getattr(settings, section), **{key: value})})
