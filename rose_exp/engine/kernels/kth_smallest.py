"""A Triton kernel that finds the k-th smallest score by counting digits, on CUDA, float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
COUNTED = 4096  # scores that one program counts


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) of float32 scores along the last dimension, which is kept with size 1.

    Uses radix selection: each of four passes determines 8 bits, from the highest down, by counting the scores that match
    the bits already determined.
    """
    flat = scores.reshape(-1, scores.shape[-1]).contiguous()
    slices, n = flat.shape
    counts = torch.zeros(slices, 4, 256, dtype=torch.int32, device=flat.device)
    state = torch.zeros(slices, 5, 2, dtype=torch.int64, device=flat.device)  # bits found so far, and the rank among those
    values = torch.empty(slices, dtype=torch.float32, device=flat.device)
    grid = (triton.cdiv(n, COUNTED), slices)
    for digit in range(4):
        _count_digit[grid](flat, counts, state, n, k, digit, COUNTED, num_warps=WARPS)
    _last_digit[(slices,)](counts, state, values, num_warps=1)
    return values.view(*scores.shape[:-1], 1)


@triton.jit
def _next_digit(counts, state, k, piece, DIGIT: tl.constexpr):
    """The bits found, and the rank left, before digit ``DIGIT`` of slice ``piece`` is counted."""
    prefix = tl.zeros((), dtype=tl.int64)
    remaining = prefix + k
    if DIGIT > 0:
        if DIGIT > 1:
            prefix = tl.load(state + (piece * 5 + DIGIT - 1) * 2)
            remaining = tl.load(state + (piece * 5 + DIGIT - 1) * 2 + 1)
        bins = tl.arange(0, 256)
        counted = tl.load(counts + (piece * 4 + DIGIT - 1) * 256 + bins)
        value = tl.sum((tl.cumsum(counted, 0) < remaining).to(tl.int64), axis=0)
        remaining -= tl.sum(tl.where(bins < value, counted, 0), axis=0)
        prefix += value << (32 - 8 * DIGIT)
    return prefix, remaining


@triton.jit
def _count_digit(scores, counts, state, n, k, DIGIT: tl.constexpr, TILE: tl.constexpr):
    tile, piece = tl.program_id(0), tl.program_id(1).to(tl.int64)
    prefix, remaining = _next_digit(counts, state, k, piece, DIGIT)
    if tile == 0:  # for the next digit; no program of this one reads it
        tl.store(state + (piece * 5 + DIGIT) * 2, prefix)
        tl.store(state + (piece * 5 + DIGIT) * 2 + 1, remaining)
    place = tile * TILE + tl.arange(0, TILE)
    inside = place < n
    score = tl.load(scores + piece * n + place, mask=inside, other=0.0)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # both zeros are one
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648  # 0 to 2³²−1, sorts as the scores do
    above: tl.constexpr = 32 - 8 * DIGIT
    agrees = inside & ((key >> above) == (prefix >> above))
    digit = tl.where(agrees, (key >> (above - 8)) & 255, 256).to(tl.int32)
    bins = tl.arange(0, 512)
    histogram = tl.histogram(digit, 512)
    tl.atomic_add(counts + (piece * 4 + DIGIT) * 256 + bins, histogram, mask=(bins < 256) & (histogram > 0))


@triton.jit
def _last_digit(counts, state, values):
    piece = tl.program_id(0).to(tl.int64)
    key, _ = _next_digit(counts, state, 0, piece, 4)
    bits = (key - 2147483648).to(tl.int32)
    tl.store(values + piece, (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))
