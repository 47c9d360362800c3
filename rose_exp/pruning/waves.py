"""Splitting the layers of a block into parts that are calibrated one after another, to limit the memory of their moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engine.moments import sums_dtype
from .component import Group
from .context import PruneContext
from .plan import PruningPlan


def limited_waves(groups: Sequence[Group], plan: PruningPlan, context: PruneContext) -> list[list[Group]]:
    """Split groups so that the moments of each part take at most ``context.moments_bytes``, but at least one group each.

    Channel permutation and structured removal change other layers of the block, so their groups stay together.
    """
    if context.moments_bytes is None or plan.structured or plan.permutes:
        return [list(groups)]
    kinds = [torch.promote_types(group[0].weight.dtype, torch.float32) for group in groups]
    sizes = [
        group[0].columns ** 2 * sums_dtype(context.device, kind).itemsize for group, kind in zip(groups, kinds, strict=True)
    ]
    return [[groups[place] for place in part] for part in successive_parts(sizes, context.moments_bytes)]


def successive_parts(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Split items into successive parts whose sizes sum up to at most ``limit``, but at least one item each.

    Returns:
        The places of the items of each part; one empty part if there are no items.
    """
    parts: list[list[int]] = [[]]
    filled = 0
    for place, size in enumerate(sizes):
        if parts[-1] and filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(place)
        filled += size
    return parts
