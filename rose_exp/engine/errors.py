"""Relative output errors; NaN raises an error instead of being clamped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .products import quadratic_form

NOISE = 1e-6  # of the layer's output power: less is rounding of float32


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """tr((W−V) H (W−V)ᵀ) / tr(W H Wᵀ) of W and V (rows, columns); 0 if the layer's output is zero.

    Raises:
        ValueError: if either is not finite, even in float64.
    """
    lost, total = torch.stack([quadratic_form(weight - pruned, hessian), quadratic_form(weight, hessian)]).tolist()
    if not (NOISE * total < lost < math.inf and math.sqrt(torch.finfo(weight.dtype).tiny) < total < math.inf):
        lost, total = exact_form(weight.double() - pruned.double(), hessian), exact_form(weight, hessian)
    return share(lost, total)


def exact_form(w: Tensor, symmetric: Tensor) -> float:
    """tr(w · symmetric · wᵀ), in float64."""
    return float(quadratic_form(w.double(), symmetric.double()))


def share(lost: float, total: float) -> float:
    """``lost`` / ``total``, at least 0; 0 if ``total`` is zero, or negative by rounding.

    Raises:
        ValueError: if either is not finite.
    """
    if not (math.isfinite(lost) and math.isfinite(total)):
        raise ValueError(
            f"weight, moments: expected a layer whose output error fits float64, got an error of {lost:g} for an output power "
            f"of {total:g}"
        )
    return max(0.0, lost) / total if total > 0 else 0.0
