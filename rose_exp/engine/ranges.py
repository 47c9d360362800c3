"""Checks and scaling for numbers outside the range of the precision.

Squares of weights and inputs exceed the range of float32 long before the weights and inputs do. Results do not depend on the
scale of a weight, so a weight far from 1 is scaled by a power of two while it is solved, without any rounding. Inputs out of
range are rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .curvature import Curvature
from .moments import InputMoments

COMFORTABLE = 30  # no scaling while the binary exponent of the largest output is within ± this
LARGEST_EXPONENT = {torch.float32: 100, torch.float64: 800}  # of the mean of H's diagonal: its square roots and sums have room
LARGEST_WEIGHT = {torch.float32: 64, torch.float64: 500}  # largest exponent of a scaled weight
LARGEST_SHIFT = 1000  # 2 to its power is a float64
NEGLIGIBLE = 1e-6  # of the largest output, what inputs whose squares are rounded to zero may add


@dataclass(frozen=True)
class Extent:
    """Size of the outputs of one weight.

    Attributes:
        output: the largest |W|·sqrt(E[x²]) of the weight.
        shift: binary exponent of the factor applied to the weight while it is solved.
    """

    output: float
    shift: int


def scaled(tensor: Tensor, shift: int) -> Tensor:
    """Return ``tensor`` · 2**shift, or ``tensor`` itself for 0, in two steps to avoid intermediate overflow."""
    return tensor * 2.0 ** (shift // 2) * 2.0 ** (shift - shift // 2) if shift else tensor


def finite(tensor: Tensor) -> Tensor:
    """Return whether all of a tensor is finite, as a scalar float64 tensor."""
    return torch.isfinite(torch.stack(torch.aminmax(tensor))).all().double()  # both are NaN if anything is


def extents(weights: Sequence[Tensor], curvature: Curvature) -> list[Tensor]:
    """Return the inputs of :func:`read_extents` as scalar float64 tensors, without synchronizing the device."""
    diagonal, norms = curvature.hessian.diagonal(), curvature.norms.double()
    lost = (diagonal == 0) & (curvature.moments.sum != 0)  # columns of inputs whose squares are rounded to zero
    statistics = [finite(curvature.hessian), diagonal.double().mean(), lost.any().double()]
    for weight in weights:
        low, high = torch.aminmax(weight, dim=0)
        largest = torch.maximum(-low, high).double()  # (columns,)
        statistics += [largest.max(), (largest * norms).max(), largest.masked_fill(~lost, 0).max()]
    return statistics


def read_extents(values: Sequence[float], dtype: torch.dtype) -> list[Extent]:
    """Return the extent of each weight from the values of :func:`extents`.

    Raises:
        ValueError: if the Hessian or the outputs exceed the range of ``dtype``.
    """
    is_finite, mean, lost, *weight_values = values
    kind, limit = str(dtype).removeprefix("torch."), 2.0 ** LARGEST_EXPONENT[dtype]
    if not is_finite or mean > limit:
        raise ValueError(
            f"moments: expected inputs whose Hessian fits {kind} (a mean diagonal of at most {limit:.3g}), got a mean diagonal "
            f"of {mean:.3g}; scale the inputs down, or use float64 moments"
        )
    if 0 < mean < 1 / limit or (mean == 0 and lost):
        raise ValueError(
            f"moments: expected inputs whose Hessian fits {kind} (a mean diagonal of at least {1 / limit:.3g}), got a mean "
            f"diagonal of {mean:.3g}; scale the inputs up, or use float64 moments"
        )
    layer_extents = []
    for largest, output, unseen in zip(*(weight_values[i::3] for i in range(3)), strict=True):
        if not math.isfinite(output):
            raise ValueError(f"weight: expected outputs that fit float64, got weights up to {largest:.3g}")
        if unseen * torch.finfo(dtype).smallest_normal ** 0.5 > NEGLIGIBLE * output:
            raise ValueError(
                f"moments: expected inputs whose squares fit {kind}, got columns whose squares are rounded to zero, with "
                f"weights up to {unseen:.3g}; scale these columns, or use float64 moments"
            )
        layer_extents.append(Extent(output, _shift(largest, output, dtype)))
    return layer_extents


def _shift(largest: float, output: float, dtype: torch.dtype) -> int:
    exponent = math.frexp(output)[1]
    if output == 0 or abs(exponent) <= COMFORTABLE:
        return 0
    return min(-exponent, LARGEST_WEIGHT[dtype] - math.frexp(largest)[1], LARGEST_SHIFT)


def check_range(moments: InputMoments, dtype: torch.dtype) -> None:
    """Check that the Hessian of the inputs fits ``dtype``.

    Raises:
        ValueError: if it does not fit.
    """
    curvature = Curvature(moments, 0.0, dtype)
    read_extents(torch.stack(extents([], curvature)).tolist(), dtype)
