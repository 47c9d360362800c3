"""Selecting the smallest scores: exact counts, the earlier of equals first, and nothing sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import cpu

FEW = 16  # scores up to which comparing each with each is the fastest selection


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
    if _counted(scores):
        return cpu.smallest(scores, count)
    threshold = kth_smallest(scores, count)
    below = scores < threshold
    tied = scores == threshold
    missing = count - below.sum(dim=-1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=-1) <= missing))


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest score (from 1) along the last dimension, which stays as 1."""
    if _counted(scores):
        return cpu.kth_smallest(scores, k)
    return scores.kthvalue(k, dim=-1, keepdim=True).values


def _counted(scores: Tensor) -> bool:
    """Whether counting beats torch's selection: on a CPU, from some ten thousand scores on."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.shape[-1] >= 16384


def _by_rank(scores: Tensor, count: int) -> Tensor:
    """Count for each score how many come before it."""
    width = scores.shape[-1]
    rank = torch.zeros_like(scores, dtype=torch.uint8)
    for i in range(width):
        for j in range(i):
            sooner = scores[..., i] < scores[..., j]  # of equals, j < i comes first
            rank[..., j] += sooner
            rank[..., i] += ~sooner
    return rank < count
