"""Selection of the smallest scores with exact counts, ties by position, and without sorting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels import cpu
from .kernels.available import has_triton

FEW = 16  # up to this many scores, pairwise comparison is fastest
MANY = 16384  # from this many scores, counting is faster than torch's selection on a CPU


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` smallest entries along the last dimension; among equals, those that come first.

    Args:
        scores: (..., n), without NaN.
    Returns:
        bool, the shape of ``scores``.
    """
    n = scores.shape[-1]
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if n <= FEW:
        return _by_rank(scores, count)
    if _on_cpu(scores) and n >= MANY:
        return cpu.smallest(scores, count)
    threshold = kth_smallest(scores, count)
    below = scores < threshold
    tied = scores == threshold
    missing = count - below.sum(dim=-1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=-1) <= missing))


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest score (from 1) along the last dimension, which is kept with size 1."""
    if _on_cpu(scores) and scores.shape[-1] >= MANY:
        return cpu.kth_smallest(scores, k)
    if scores.is_cuda and scores.dtype == torch.float32 and scores.shape[-1] >= MANY and has_triton():
        from .kernels.kth_smallest import kth_smallest as by_digits  # needs Triton

        return by_digits(scores, k)
    return scores.kthvalue(k, dim=-1, keepdim=True).values


def lost_by_threshold(scores: Tensor, width: int, count: Callable[[int], int]) -> Tensor:
    """Sum by column, (columns,), the scores of each block up to the one at sorted index count(n) of the block's n.

    ``scores`` (columns, rows) is non-negative; a block has ``width`` columns. A count of 0 sums nothing, a count of n all.
    """
    if _on_cpu(scores):
        return cpu.lost_by_threshold(scores, width, count)
    lost = torch.empty(len(scores), dtype=scores.dtype, device=scores.device)
    for columns, blocks in _blocks(scores, width):
        flat = blocks.flatten(1)
        n = flat.shape[1]
        if count(n) in (0, n):
            marked = blocks * (count(n) > 0)
        else:
            marked = torch.where(flat <= kth_smallest(flat, count(n) + 1), flat, 0).view_as(blocks)
        lost[columns] = marked.sum(dim=2).flatten()
    return lost


def lost_by_rank(scores: Tensor, width: int, count: Callable[[int], int]) -> Tensor:
    """Sum by column, (columns,), the count(width) smallest scores in each row of each block.

    ``scores`` has shape (columns, rows); a block has ``width`` columns.
    """
    if _on_cpu(scores):
        return cpu.lost_by_rank(scores, width, count)
    lost = torch.empty(len(scores), dtype=scores.dtype, device=scores.device)
    for columns, blocks in _blocks(scores, width):
        by_row = blocks.transpose(1, 2)
        marked = torch.where(smallest(by_row, count(by_row.shape[2])), by_row, 0)
        lost[columns] = marked.sum(dim=1).flatten()
    return lost


def _blocks(scores: Tensor, width: int) -> list[tuple[slice, Tensor]]:
    """Return the columns and scores (blocks, width, rows) of the whole blocks, then those of a narrower last one."""
    columns = len(scores)
    full = columns - columns % width
    blocks = [(slice(0, full), scores[:full].unflatten(0, (-1, width)))] if full else []
    if full < columns:
        blocks.append((slice(full, columns), scores[full:][None]))
    return blocks


def _on_cpu(scores: Tensor) -> bool:
    """Return whether the compiled CPU kernels support these scores."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32


def _by_rank(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest scores by counting, for each score, how many come before it."""
    width = scores.shape[-1]
    rank = torch.zeros_like(scores, dtype=torch.uint8)
    for i in range(width):
        for j in range(i):
            sooner = scores[..., i] < scores[..., j]  # of equals, j < i comes first
            rank[..., j] += sooner
            rank[..., i] += ~sooner
    return rank < count
