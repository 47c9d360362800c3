"""Kernels for CUDA, float32, in Triton: one program sweeps one block for a tile of rows.

Rows are independent once a block's mask is known, or choose it themselves (N:M), so a program keeps its tile of the
block, (columns, rows), in registers throughout and needs no data from other programs. A column is read from the tile by a
masked sum and pruned; its error is then subtracted from the following columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain

choose = plain.choose  # a selection over the whole block, which torch does on the device

CHOSEN_TILE = 4096  # elements in a tile of a sweep with a given mask: 32 registers of each of 128 threads
GROUPS_TILE = 2048  # elements in a tile of an N:M sweep, which keeps several values for each
MOST_ROWS, FEWEST_ROWS = 32, 4


def launch(size: int, groups: bool) -> tuple[int, int]:
    """Return the rows of a tile and the warps of a program for blocks of ``size`` columns, a power of two.

    With these numbers, no kernel spills registers on compute capabilities 8.0, 9.0 and 10.0 for blocks of up to 512 columns.

    Args:
        groups: whether the sweep chooses the masks of groups.
    """
    if groups:
        return max(FEWEST_ROWS, min(MOST_ROWS // 2, GROUPS_TILE // size)), 8 if size <= 64 else 4
    return max(FEWEST_ROWS, min(MOST_ROWS, CHOSEN_TILE // size)), 4


def sweep_chosen(w: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
    """Sweep one block ``w`` (width, rows) in place where ``mask`` is True and return the errors (width, rows)."""
    width, rows = w.shape
    errors = torch.empty_like(w)
    upper = upper.contiguous()
    size = triton.next_power_of_2(width)
    tile, warps = launch(size, groups=False)
    _sweep_chosen[(triton.cdiv(rows, tile),)](w, upper, mask, errors, width, rows, size, tile, num_warps=warps)
    return errors


def sweep_groups(w: Tensor, upper: Tensor, mask: Tensor, widths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Sweep one block, choosing each row's mask of a group (``counts`` of ``widths`` columns) when the sweep reaches it."""
    width, rows = w.shape
    errors = torch.empty_like(w)
    upper = upper.contiguous()
    ends = torch.tensor([*widths, *counts], dtype=torch.int32)
    ends[: len(widths)] = ends[: len(widths)].cumsum(0)
    plan = ends.to(w.device, non_blocking=True)  # the end of each group, and how many of it to prune
    size = triton.next_power_of_2(width)
    tile, warps = launch(size, groups=True)
    grid = (triton.cdiv(rows, tile),)
    _sweep_groups[grid](w, upper, mask, errors, plan, len(widths), width, rows, size, tile, num_warps=warps)
    return errors


@triton.jit
def _column(tile, column, j):
    """Row j of the tile (columns, rows): one column of the layer."""
    return tl.sum(tl.where(column[:, None] == j, tile, 0.0), axis=0)


@triton.jit
def _prune_column(tile, column, pruned, upper, errors, j, width, rows, row, inside):
    """Prune column j of the tile in the rows that ``pruned`` selects, store its error, and update the columns after it."""
    lost = tl.where(pruned, _column(tile, column, j), 0.0)
    error = lost / tl.load(upper + j * width + j)
    tl.store(errors + j * rows + row, error, mask=inside)
    factors = tl.load(upper + j * width + column, mask=(column > j) & (column < width), other=0.0)
    tile -= factors[:, None] * error[None, :]
    return tl.where((column[:, None] == j) & pruned[None, :], 0.0, tile)


@triton.jit
def _sweep_chosen(w, upper, mask, errors, width, rows, WIDTH: tl.constexpr, TILE: tl.constexpr):
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    place = column[:, None] * rows + row[None, :]
    in_bounds = (column[:, None] < width) & inside[None, :]
    tile = tl.load(w + place, mask=in_bounds, other=0.0)
    for j in range(width):
        pruned = tl.load(mask + j * rows + row, mask=inside, other=0) != 0
        tile = _prune_column(tile, column, pruned, upper, errors, j, width, rows, row, inside)
    tl.store(w + place, tile, mask=in_bounds)


@triton.jit
def _sweep_groups(w, upper, mask, errors, plan, groups, width, rows, WIDTH: tl.constexpr, TILE: tl.constexpr):
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    place = column[:, None] * rows + row[None, :]
    in_bounds = (column[:, None] < width) & inside[None, :]
    tile = tl.load(w + place, mask=in_bounds, other=0.0)
    scale = tl.load(upper + column * width + column, mask=column < width, other=1.0)
    start = 0
    for group in range(groups):
        stop = tl.load(plan + group)
        count = tl.load(plan + groups + group)
        scaled = tile / scale[:, None]
        saliency = scaled * scaled
        before = tl.zeros((WIDTH, TILE), dtype=tl.int32)  # how many of the group are pruned first
        for j in range(start, stop):
            other = _column(saliency, column, j)[None, :]
            before += ((other < saliency) | ((other == saliency) & (column[:, None] > j))).to(tl.int32)
        chosen = (before < count).to(tl.float32)
        for j in range(start, stop):
            pruned = _column(chosen, column, j) > 0.5
            tl.store(mask + j * rows + row, pruned, mask=inside)
            tile = _prune_column(tile, column, pruned, upper, errors, j, width, rows, row, inside)
        start = stop
    tl.store(w + place, tile, mask=in_bounds)
