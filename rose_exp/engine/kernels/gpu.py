"""Kernels for CUDA, float32, in Triton: one program sweeps one block for a tile of rows; and a selection by counting.

Rows are independent once a block's mask is known, or choose it by themselves (N:M), so a program keeps its tile of the
block, (columns, rows), in registers from the first column to the last and needs nothing from the others. A column is read
out of the tile by a masked sum, pruned, and its error taken from the columns still to come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain

choose = plain.choose  # a selection over the whole block, which torch does on the device

ROWS = 32  # in a tile: with 128 columns, 32 registers of each of 128 threads
WARPS = 4
COUNTED = 4096  # scores that one program counts


def sweep_chosen(w: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
    """Sweep one block ``w`` (width, rows) in place where ``mask`` is True; returns the errors (width, rows)."""
    width, rows = w.shape
    errors = torch.empty_like(w)
    upper = upper.contiguous()
    grid = (triton.cdiv(rows, ROWS),)
    _sweep_chosen[grid](w, upper, mask, errors, width, rows, triton.next_power_of_2(width), ROWS, num_warps=WARPS)
    return errors


def sweep_groups(w: Tensor, upper: Tensor, mask: Tensor, widths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The same, choosing the mask of each group (``counts`` of ``widths`` columns) in each row when it is reached."""
    width, rows = w.shape
    errors = torch.empty_like(w)
    upper = upper.contiguous()
    ends = torch.tensor([*widths, *counts], dtype=torch.int32)
    ends[: len(widths)] = ends[: len(widths)].cumsum(0)
    plan = ends.to(w.device, non_blocking=True)  # where each group ends, and how many of it go
    grid = (triton.cdiv(rows, ROWS),)
    size = triton.next_power_of_2(width)
    _sweep_groups[grid](w, upper, mask, errors, plan, len(widths), width, rows, size, ROWS, num_warps=WARPS)
    return errors


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) of float32 scores along the last dimension, which stays as 1.

    A radix selection: four passes count the scores by 8 bits each, from the highest down, of those that agree with what
    the passes before have found.
    """
    flat = scores.reshape(-1, scores.shape[-1]).contiguous()
    slices, n = flat.shape
    counts = torch.zeros(slices, 4, 256, dtype=torch.int32, device=flat.device)
    state = torch.zeros(slices, 5, 2, dtype=torch.int64, device=flat.device)  # bits found so far, and the rank among those
    found = torch.empty(slices, dtype=torch.float32, device=flat.device)
    grid = (triton.cdiv(n, COUNTED), slices)
    for digit in range(4):
        _count_digit[grid](flat, counts, state, n, k, digit, COUNTED, num_warps=WARPS)
    _last_digit[(slices,)](counts, state, found, num_warps=1)
    return found.view(*scores.shape[:-1], 1)


@triton.jit
def _next_digit(counts, state, k, piece, DIGIT: tl.constexpr):
    """The bits found, and the rank left, before digit ``DIGIT`` of slice ``piece`` is counted."""
    prefix = tl.zeros((), dtype=tl.int64)
    left = prefix + k
    if DIGIT > 0:
        if DIGIT > 1:
            prefix = tl.load(state + (piece * 5 + DIGIT - 1) * 2)
            left = tl.load(state + (piece * 5 + DIGIT - 1) * 2 + 1)
        bins = tl.arange(0, 256)
        counted = tl.load(counts + (piece * 4 + DIGIT - 1) * 256 + bins)
        value = tl.sum((tl.cumsum(counted, 0) < left).to(tl.int64), axis=0)
        left -= tl.sum(tl.where(bins < value, counted, 0), axis=0)
        prefix += value << (32 - 8 * DIGIT)
    return prefix, left


@triton.jit
def _count_digit(scores, counts, state, n, k, DIGIT: tl.constexpr, TILE: tl.constexpr):
    tile, piece = tl.program_id(0), tl.program_id(1).to(tl.int64)
    prefix, left = _next_digit(counts, state, k, piece, DIGIT)
    if tile == 0:  # for the next digit; no program of this one reads it
        tl.store(state + (piece * 5 + DIGIT) * 2, prefix)
        tl.store(state + (piece * 5 + DIGIT) * 2 + 1, left)
    place = tile * TILE + tl.arange(0, TILE)
    inside = place < n
    score = tl.load(scores + piece * n + place, mask=inside, other=0.0)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # both zeros are one
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648  # 0 to 2³²−1, sorts as the scores do
    above: tl.constexpr = 32 - 8 * DIGIT
    agrees = inside & ((key >> above) == (prefix >> above))
    digit = tl.where(agrees, (key >> (above - 8)) & 255, 256).to(tl.int32)
    bins = tl.arange(0, 512)
    found = tl.histogram(digit, 512)
    tl.atomic_add(counts + (piece * 4 + DIGIT) * 256 + bins, found, mask=(bins < 256) & (found > 0))


@triton.jit
def _last_digit(counts, state, found):
    piece = tl.program_id(0).to(tl.int64)
    key, _ = _next_digit(counts, state, 0, piece, 4)
    bits = (key - 2147483648).to(tl.int32)
    tl.store(found + piece, (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


@triton.jit
def _column(tile, column, j):
    """Row j of the tile (columns, rows): one column of the layer."""
    return tl.sum(tl.where(column[:, None] == j, tile, 0.0), axis=0)


@triton.jit
def _prune_column(tile, column, gone, upper, errors, j, width, rows, row, inside):
    """Prune column j of the tile where ``gone`` (rows,), store its error, and compensate in the columns after it."""
    lost = tl.where(gone, _column(tile, column, j), 0.0)
    error = lost / tl.load(upper + j * width + j)
    tl.store(errors + j * rows + row, error, mask=inside)
    factors = tl.load(upper + j * width + column, mask=(column > j) & (column < width), other=0.0)
    tile -= factors[:, None] * error[None, :]
    return tl.where((column[:, None] == j) & gone[None, :], 0.0, tile)


@triton.jit
def _sweep_chosen(w, upper, mask, errors, width, rows, WIDTH: tl.constexpr, TILE: tl.constexpr):
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    place = column[:, None] * rows + row[None, :]
    held = (column[:, None] < width) & inside[None, :]
    tile = tl.load(w + place, mask=held, other=0.0)
    for j in range(width):
        gone = tl.load(mask + j * rows + row, mask=inside, other=0) != 0
        tile = _prune_column(tile, column, gone, upper, errors, j, width, rows, row, inside)
    tl.store(w + place, tile, mask=held)


@triton.jit
def _sweep_groups(w, upper, mask, errors, plan, groups, width, rows, WIDTH: tl.constexpr, TILE: tl.constexpr):
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    place = column[:, None] * rows + row[None, :]
    held = (column[:, None] < width) & inside[None, :]
    tile = tl.load(w + place, mask=held, other=0.0)
    scale = tl.load(upper + column * width + column, mask=column < width, other=1.0)
    start = 0
    for group in range(groups):
        stop = tl.load(plan + group)
        count = tl.load(plan + groups + group)
        scaled = tile / scale[:, None]
        saliency = scaled * scaled
        before = tl.zeros((WIDTH, TILE), dtype=tl.int32)  # how many of the group go sooner
        for j in range(start, stop):
            other = _column(saliency, column, j)[None, :]
            before += ((other < saliency) | ((other == saliency) & (column[:, None] > j))).to(tl.int32)
        chosen = (before < count).to(tl.float32)
        for j in range(start, stop):
            gone = _column(chosen, column, j) > 0.5
            tl.store(mask + j * rows + row, gone, mask=inside)
            tile = _prune_column(tile, column, gone, upper, errors, j, width, rows, row, inside)
        start = stop
    tl.store(w + place, tile, mask=held)
