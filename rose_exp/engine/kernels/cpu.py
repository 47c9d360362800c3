"""Kernels for the CPU, float32, compiled by Numba: loops that torch would run as many small operations.

Rows are independent once a block's mask is known, so each thread processes tiles of rows and keeps a tile of the block and
its errors in the L1 cache. A column is updated when the sweep reaches it (w_j −= Σ_{i<j} Uᵢⱼ eᵢ), eight terms at a
time, so that each weight is stored once.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

ROWS = 64  # in a tile: 64 rows of a block of 128 columns and their errors fit the L1 cache together

_parallel = numba.njit(parallel=True, fastmath={"contract"}, cache=True)


def sweep_chosen(w: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
    """Sweep one block ``w`` (width, rows) in place where ``mask`` is True and return the errors (width, rows)."""
    errors = torch.empty_like(w)
    _as_many_threads_as_torch()
    _sweep_chosen(w.numpy(), upper.T.contiguous().numpy(), mask.numpy(), errors.numpy())
    return errors


def sweep_groups(w: Tensor, upper: Tensor, mask: Tensor, widths: list[int], counts: list[int]) -> Tensor:
    """Sweep one block, choosing each row's mask of a group (``counts`` of ``widths`` columns) when the sweep reaches it."""
    errors = torch.empty_like(w)
    lower = upper.T.contiguous().numpy()
    _as_many_threads_as_torch()
    _sweep_groups(w.numpy(), lower, mask.numpy(), errors.numpy(), np.array(widths), np.array(counts))
    return errors


def choose(w: Tensor, upper: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` weights of smallest saliency (w / Uⱼⱼ)² in one block ``w`` (width, rows).

    Ties are broken by position in the layer, row by row.
    """
    mask = torch.empty_like(w, dtype=torch.bool)
    if not 0 < count < w.numel():
        return mask.fill_(count > 0)
    _as_many_threads_as_torch()
    _choose(w.numpy(), upper.diagonal().reciprocal().numpy(), count, mask.numpy())
    return mask


def smallest(scores: Tensor, count: int) -> Tensor:
    """:func:`rose_exp.engine.patterns.smallest` of float32 scores, 0 < count < n."""
    keys = _keys(scores)
    mask = torch.empty(keys.shape, dtype=torch.bool)
    _as_many_threads_as_torch()
    _smallest(keys, count, mask.numpy())
    return mask.view(scores.shape)


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest (from 1) of float32 scores along the last dimension, which is kept with size 1."""
    keys = _keys(scores)
    kth_keys = np.empty(len(keys), dtype=np.int32)
    _as_many_threads_as_torch()
    _kth_smallest(keys, k, kth_keys)
    return torch.from_numpy(_flip_negative(kth_keys).view(np.float32)).view(*scores.shape[:-1], 1)


def lost_by_threshold(scores: Tensor, width: int, count: Callable[[int], int]) -> Tensor:
    """:func:`rose_exp.engine.selection.lost_by_threshold` of float32 scores."""
    columns, rows = scores.shape
    counts = np.array([count(rows * min(width, columns - start)) for start in range(0, columns, width)])
    lost = torch.empty(columns)
    _as_many_threads_as_torch()
    _lost_by_threshold(scores.contiguous().numpy(), width, counts, lost.numpy())
    return lost


def lost_by_rank(scores: Tensor, width: int, count: Callable[[int], int]) -> Tensor:
    """:func:`rose_exp.engine.selection.lost_by_rank` of float32 scores."""
    lost = torch.empty(len(scores))
    _as_many_threads_as_torch()
    _lost_by_rank(scores.contiguous().numpy(), width, count(width), count(len(scores) % width), lost.numpy())
    return lost


def _as_many_threads_as_torch() -> None:
    """Set Numba's thread count to that of torch; both share the OpenMP setting, which Numba would otherwise change."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # the first call starts as many as there are cores
        torch.set_num_threads(threads)


def _keys(scores: Tensor) -> np.ndarray:
    """Return int32 keys (rows, n) that sort like the float32 scores (..., n)."""
    scores = scores + 0.0  # -0.0 becomes 0.0, its equal
    return _flip_negative(scores.view(-1, scores.shape[-1]).numpy().view(np.int32))


def _flip_negative(bits: np.ndarray) -> np.ndarray:
    """Flip negative float bits, which sort in reverse, so that all sort as signed integers; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF) if (bits < 0).any() else bits


@numba.njit(fastmath={"contract"}, inline="always")
def _subtract(column, factors, errors, count):
    """column −= Σ_{i < count} factors[i] · errors[i], over one tile of rows."""
    i = 0
    while i + 8 <= count:
        f0, f1, f2, f3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        f4, f5, f6, f7 = factors[i + 4], factors[i + 5], factors[i + 6], factors[i + 7]
        for r in range(ROWS):
            column[r] -= (
                f0 * errors[i, r]
                + f1 * errors[i + 1, r]
                + f2 * errors[i + 2, r]
                + f3 * errors[i + 3, r]
                + f4 * errors[i + 4, r]
                + f5 * errors[i + 5, r]
                + f6 * errors[i + 6, r]
                + f7 * errors[i + 7, r]
            )
        i += 8
    while i < count:
        factor = factors[i]
        for r in range(ROWS):
            column[r] -= factor * errors[i, r]
        i += 1


@_parallel
def _sweep_chosen(w, lower, mask, errors):
    width, rows = w.shape
    for tile in prange((rows + ROWS - 1) // ROWS):
        first = tile * ROWS
        count = min(ROWS, rows - first)
        e = np.zeros((width, ROWS), dtype=w.dtype)
        column = np.zeros(ROWS, dtype=w.dtype)
        for j in range(width):
            for r in range(count):
                column[r] = w[j, first + r]
            _subtract(column, lower[j], e, j)
            scale = 1 / lower[j, j]
            for r in range(count):
                lost = column[r] if mask[j, first + r] else np.float32(0)
                e[j, r] = lost * scale
                w[j, first + r] = column[r] - lost
                errors[j, first + r] = e[j, r]


@_parallel
def _sweep_groups(w, lower, mask, errors, widths, counts):
    width, rows = w.shape
    widest = widths.max()
    for tile in prange((rows + ROWS - 1) // ROWS):
        first = tile * ROWS
        count = min(ROWS, rows - first)
        e = np.zeros((width, ROWS), dtype=w.dtype)
        group = np.zeros((widest, ROWS), dtype=w.dtype)
        saliency = np.zeros((widest, ROWS), dtype=w.dtype)
        before = np.zeros((widest, ROWS), dtype=np.int32)  # how many of the group are pruned first
        start = 0
        for g in range(len(widths)):
            size = widths[g]
            for a in range(size):
                for r in range(count):
                    group[a, r] = w[start + a, first + r]
                _subtract(group[a], lower[start + a], e, start)
                scale = 1 / lower[start + a, start + a]
                for r in range(ROWS):
                    scaled = group[a, r] * scale
                    saliency[a, r] = scaled * scaled
                    before[a, r] = 0
            for a in range(size):
                for b in range(a):
                    for r in range(ROWS):
                        sooner = np.int32(saliency[a, r] < saliency[b, r])  # ties: b < a first
                        before[b, r] += sooner
                        before[a, r] += np.int32(1) - sooner
            for a in range(size):
                j = start + a
                for b in range(a):
                    factor = lower[j, start + b]
                    for r in range(ROWS):
                        group[a, r] -= factor * e[start + b, r]
                scale = 1 / lower[j, j]
                for r in range(count):
                    pruned = before[a, r] < counts[g]
                    lost = group[a, r] if pruned else np.float32(0)
                    mask[j, first + r] = pruned
                    e[j, r] = lost * scale
                    w[j, first + r] = group[a, r] - lost
                    errors[j, first + r] = e[j, r]
            start += size


@numba.njit(cache=True)
def _kth(bits, k):
    """Return the k-th smallest of int32 values, and how many are below and equal to it.

    Uses two counting passes, over the upper and the lower 16 bits.
    """
    upper = np.zeros(1 << 16, dtype=np.int32)
    for i in range(len(bits)):
        upper[(bits[i] >> 16) + (1 << 15)] += 1
    below = 0
    high = 0
    while below + upper[high] < k:
        below += upper[high]
        high += 1
    high -= 1 << 15
    lower = np.zeros(1 << 16, dtype=np.int32)
    for i in range(len(bits)):
        if bits[i] >> 16 == high:
            lower[bits[i] & 0xFFFF] += 1
    low = 0
    while below + lower[low] < k:
        below += lower[low]
        low += 1
    return np.int32((high << 16) | low), below, lower[low]


@_parallel
def _choose(w, scale, count, mask):
    width, rows = w.shape
    saliency = np.empty((width, rows), dtype=w.dtype)
    for j in prange(width):
        for r in range(rows):
            scaled = w[j, r] * scale[j]
            saliency[j, r] = scaled * scaled
    keys = saliency.view(np.int32)
    threshold, below, tied = _kth(keys.reshape(-1), count)
    for j in prange(width):
        for r in range(rows):
            mask[j, r] = keys[j, r] <= threshold
    missing = count - below
    if tied > missing:  # ties: the first ones
        for r in range(rows):
            for j in range(width):
                if keys[j, r] == threshold:
                    mask[j, r] = missing > 0
                    missing -= 1


@_parallel
def _kth_smallest(bits, k, result):
    for row in prange(len(bits)):
        result[row] = _kth(bits[row], k)[0]


@_parallel
def _smallest(bits, count, mask):
    for row in prange(len(bits)):
        values = bits[row]
        threshold, below, tied = _kth(values, count)
        missing = count - below
        for i in range(len(values)):
            mask[row, i] = values[i] <= threshold
        if tied > missing:  # ties: the first ones
            for i in range(len(values)):
                if values[i] == threshold:
                    mask[row, i] = missing > 0
                    missing -= 1


@_parallel
def _lost_by_threshold(scores, width, counts, lost):
    columns, rows = scores.shape
    for block in prange(len(counts)):
        start = block * width
        stop = min(start + width, columns)
        count = counts[block]
        keys = scores[start:stop].view(np.int32)  # bits of non-negative floats sort like the floats
        threshold = np.int32(-1)
        if count == keys.size:
            threshold = np.int32(0x7FFFFFFF)
        elif count > 0:
            threshold = _kth(keys.reshape(-1), count + 1)[0]
        for j in range(start, stop):
            total = 0.0
            for r in range(rows):
                total += scores[j, r] if keys[j - start, r] <= threshold else np.float32(0)
            lost[j] = total


@_parallel
def _lost_by_rank(scores, width, count, narrow_count, lost):
    columns, rows = scores.shape
    for block in prange((columns + width - 1) // width):
        start = block * width
        stop = min(start + width, columns)
        marked = count if stop - start == width else narrow_count
        before = np.zeros((stop - start, rows), dtype=np.int32)  # how many of the group are pruned first
        for a in range(stop - start):
            for b in range(a):
                for r in range(rows):
                    sooner = np.int32(scores[start + a, r] < scores[start + b, r])  # ties: b < a first
                    before[b, r] += sooner
                    before[a, r] += np.int32(1) - sooner
        for a in range(stop - start):
            total = 0.0
            for r in range(rows):
                total += scores[start + a, r] if before[a, r] < marked else np.float32(0)
            lost[start + a] = total
