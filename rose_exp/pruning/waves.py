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
    waves: list[list[Group]] = []
    filled = 0
    for group in groups:
        dtype = torch.promote_types(group[0].weight.dtype, torch.float32)
        size = group[0].columns ** 2 * sums_dtype(context.device, dtype).itemsize
        if not waves or filled + size > context.moments_bytes:
            waves.append([])
            filled = 0
        waves[-1].append(group)
        filled += size
    return waves
