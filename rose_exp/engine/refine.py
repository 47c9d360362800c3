"""Least squares on a fixed mask: the kept weights that reproduce the layer's output best."""

from __future__ import annotations

import torch
from torch import Tensor


def refine(weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Lower tr((W−V) H (W−V)ᵀ) over the kept entries of V by conjugate gradient.

    Every row is a problem of its own (H restricted to its kept columns), all are stepped at once, preconditioned by H's
    diagonal; a step costs one product rows × columns². A row whose residual is down to rounding is left alone: further steps
    would follow noise, and raise its error.

    Args:
        weight: V to start from, (rows, columns), zero where pruned.
        target: W, (rows, columns).
        mask: bool, (rows, columns), True where pruned.
        hessian: H, (columns, columns), not damped.
        steps: of conjugate gradient, at least 0.

    Returns:
        The refined V, a new tensor, zero where pruned.
    """
    diagonal = hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal))  # a dead column stays as it is
    kept = ~mask
    v = weight.clone()
    residual = ((target - v) @ hessian) * kept
    direction = residual * inverse
    power = (residual * direction).sum(dim=1, keepdim=True)  # (rows, 1)
    epsilon = torch.finfo(v.dtype).eps
    whole = target @ hessian
    floor = torch.maximum(epsilon * power, (8 * epsilon) ** 2 * (whole.square() * inverse).sum(dim=1, keepdim=True))
    for _ in range(steps):
        image = (direction @ hessian) * kept
        curvature = (direction * image).sum(dim=1, keepdim=True)
        going = (curvature > 0) & (power > floor)  # elsewhere the row has converged
        step = torch.where(going, power / curvature, torch.zeros_like(power))
        v.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        following = (residual * scaled).sum(dim=1, keepdim=True)
        growth = torch.where(power > 0, following / power, torch.zeros_like(power))
        direction = scaled.addcmul_(growth, direction)
        power = following
    return v
