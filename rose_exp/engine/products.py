"""Matrix products that exploit symmetric and triangular factors, which torch does not provide.

Each product splits the matrix recursively, down to blocks below which the overhead of small products exceeds the savings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bf16x2"]
"""Precision of the products that accumulate moments, see :class:`rose_exp.engine.InputMoments`."""

HALF = (torch.float16, torch.bfloat16)

LEAF = {"cpu": 192, "cuda": 1024}  # columns of the diagonal blocks, which are computed whole
PANELS = 4  # of a triangular product: four leave out three eighths of it


def add_gram(
    gram: Tensor, x: Tensor, weight: float = 1.0, precision: Precision = "float32", dtype: torch.dtype | None = None
) -> None:
    """gram += weight · xᵀ x, on and above the diagonal; the rest is undefined until :func:`mirror` fills it in.

    Args:
        gram: (columns, columns), float32 or float64; changed in place.
        x: (tokens, columns). Half-precision inputs on CUDA are multiplied directly and summed in float32, so that no
            product is rounded; otherwise x is converted to ``dtype`` first.
        precision: precision of float32 products on CUDA, see :class:`rose_exp.engine.InputMoments`.
        dtype: dtype in which the product over the tokens is computed; None uses that of ``gram``.
    """
    dtype = dtype or gram.dtype
    if x.dtype in HALF and x.is_cuda and dtype == torch.float32:
        pairs = [(x, x)]
    elif precision == "bf16x2" and dtype == torch.float32:
        x = x.to(dtype)
        large = x.bfloat16()
        small = (x - large).bfloat16()
        pairs = [(large, large), (large, small), (small, large)]
    else:
        x = x.to(dtype)
        with _tf32(precision == "tf32"):
            for rows, columns in upper_blocks(len(gram), x.device):
                add_product(gram[rows, columns], x[:, rows].T, x[:, columns], weight)
        return
    for rows, columns in upper_blocks(len(gram), x.device):
        for left, right in pairs:
            gram[rows, columns].add_(_half_product(left[:, rows].T, right[:, columns]), alpha=weight)


def add_product(total: Tensor, left: Tensor, right: Tensor, weight: float = 1.0) -> None:
    """total += weight · left · right, in place; the product is computed in the type of its factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=weight)
    else:
        total.add_(left @ right, alpha=weight)


class _tf32:  # noqa: N801  (used like a function)
    """Context manager that allows or forbids TF32 products on CUDA, overriding the process-wide setting."""

    def __init__(self, allowed: bool):
        self.allowed = allowed

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.allowed

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.before


def _half_product(left: Tensor, right: Tensor) -> Tensor:
    """left · right of half-precision matrices, summed in float32."""
    if left.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # torch 2.8 and later
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())  # slower, with the same result: float32 holds these products exactly


def upper_blocks(n: int, device: torch.device, start: int = 0) -> Iterator[tuple[slice, slice]]:
    """Yield the row and column slices of blocks that cover the upper triangle of an (n, n) matrix.

    Blocks on the diagonal are square; all others lie above it.
    """
    if n <= LEAF.get(device.type, 512):
        yield slice(start, start + n), slice(start, start + n)
        return
    half = n // 2
    middle = start + half
    yield from upper_blocks(half, device, start)
    yield slice(start, middle), slice(middle, start + n)
    yield from upper_blocks(n - half, device, middle)


def mirror(square: Tensor) -> None:
    """Copy the blocks above the diagonal to their mirrored positions, in place."""
    for rows, columns in upper_blocks(len(square), square.device):
        if rows != columns:
            square[columns, rows] = square[rows, columns].T


def quadratic_form(w: Tensor, symmetric: Tensor) -> Tensor:
    """tr(w · symmetric · wᵀ) of w (rows, columns) and a symmetric matrix, as a scalar tensor, from half of the product."""
    total = torch.zeros((), dtype=w.dtype, device=w.device)
    for rows, columns in upper_blocks(len(symmetric), w.device):
        part = (w[:, rows] @ symmetric[rows, columns]).mul_(w[:, columns]).sum()
        total += part if rows == columns else 2 * part
    return total


def times_lower(a: Tensor, upper: Tensor) -> None:
    """a ← a · upperᵀ, in place, for an upper triangular matrix."""
    for panel in _panels(len(upper)):
        a[:, panel] = a[:, panel.start :] @ upper[panel, panel.start :].T


def times_upper(a: Tensor, upper: Tensor) -> None:
    """a ← a · upper, in place, for an upper triangular matrix."""
    for panel in reversed(_panels(len(upper))):
        a[:, panel] = a[:, : panel.stop] @ upper[: panel.stop, panel]


def upper_times(upper: Tensor, a: Tensor) -> None:
    """a ← upper · a, in place, for an upper triangular matrix."""
    for panel in _panels(len(upper)):
        a[panel] = upper[panel, panel.start :] @ a[panel.start :]


def _panels(n: int) -> list[slice]:
    step = max(192, -(-n // PANELS))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
