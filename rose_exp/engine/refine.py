"""Post-pruning refinement: selects a new mask over the whole layer and fits the kept weights to the layer's output.

Columns are scaled by sqrt(diag H), so that H has a unit diagonal. ADMM then weights all columns equally, and conjugate gradient
needs no preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from .bounds import AboveZero, Count, NonNegative, Positive, check_options
from .curvature import Curvature
from .patterns import Sparsity
from .products import quadratic_form


@dataclass(frozen=True)
class Refine:
    """Options of post-pruning refinement.

    ``Refine(8)`` fits the kept weights in 8 steps. ``Refine(8, mask_iterations=20)`` first selects a new mask.

    Args:
        steps: number of conjugate gradient steps on the mask.
        tolerance: a row stops once its gradient norm is below this fraction of the norm with all weights pruned.
        damping: λ in the objective tr((W−V)(H + λI)(W−V)ᵀ), as a fraction of the mean of H's diagonal. It keeps the weights
            close to W and reduces overfitting to the calibration data.
        mask_iterations: number of ADMM iterations over the whole layer, starting from the pruned weights; 0 keeps the mask. If
            the error would increase, refinement is rejected and the result reports it.
        penalty: initial ρ of ADMM.
        growth: factor by which ρ grows.
        every: number of iterations between increases of ρ.
        relaxation: over-relaxation of ADMM, at least 1 (none) and below 2 (Boyd et al., 2011, section 3.4.3).
    """

    steps: Count = 0
    tolerance: NonNegative = 1e-4
    damping: NonNegative = 0.0
    mask_iterations: Count = 0
    penalty: AboveZero = 0.2
    growth: Annotated[float, Ge(1), Lt(math.inf)] = 2.0
    every: Positive = 4
    relaxation: Annotated[float, Ge(1), Lt(2)] = 1.6

    def __post_init__(self):
        check_options(self)

    def __bool__(self) -> bool:
        return self.steps > 0 or self.mask_iterations > 0


@dataclass(frozen=True)
class Refined:
    """A refined layer.

    Attributes:
        weight, mask: (rows, columns).
        mask_changes: number of weights that only the new mask prunes, a scalar int64 tensor.
        taken: whether the refined weight is used, a scalar bool tensor; False if refinement was rejected.
    """

    weight: Tensor
    mask: Tensor
    mask_changes: Tensor
    taken: Tensor


def refine(
    weights: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor],
    curvature: Curvature,
    sparsities: Sequence[Sparsity],
    how: Refine,
) -> list[Refined]:
    """Refine pruned layers that share their inputs, without synchronizing the device.

    Args:
        weights: V of each layer, (rows, columns), zero where pruned.
        targets: regression target of each layer, (rows, columns).
        masks: bool, (rows, columns), True where pruned.
        curvature: statistics of the inputs. H is damped by ``how.damping``, not by the curvature's damping.
        sparsities: sparsity pattern of each layer, for selecting a new mask.
    """
    hessian, scale = curvature.normalized(how.damping)
    rows = [len(weight) for weight in weights]
    target, start = torch.cat(list(targets)) * scale, torch.cat(list(weights)) * scale  # concatenated for one product
    mask = torch.cat(list(masks))
    chosen, first = mask, start
    if how.mask_iterations:
        first, chosen = _choose_again(start, target, hessian, sparsities, rows, how)
    solved = conjugate_gradient(first, target, chosen, hessian, how.steps, how.tolerance)
    refined = []
    layers = zip(*(x.split(rows) for x in (target, start, mask, solved, chosen)), targets, weights, strict=True)
    for goal, old, old_mask, new, new_mask, plain, pruned in layers:
        error = quadratic_form(goal - new, hessian)
        better = (error <= quadratic_form(goal - old, hessian)) & torch.isfinite(error)
        new = torch.where(curvature.dead, plain.masked_fill(new_mask, 0), new / scale)  # dead columns keep their values
        weight, final = torch.where(better, new, pruned), torch.where(better, new_mask, old_mask)
        refined.append(Refined(weight, final, (final & ~old_mask).sum(), better))
    return refined


def _choose_again(
    start: Tensor, target: Tensor, hessian: Tensor, sparsities: Sequence[Sparsity], rows: Sequence[int], how: Refine
) -> tuple[Tensor, Tensor]:
    """Return pruned weights and masks from ADMM over row-wise concatenated layers, (all rows, columns).

    The steps are those of ALPS (see :mod:`rose_exp.engine.methods.alps`). ADMM starts from the result of another method, so a
    few iterations suffice. ρ grows on a fixed schedule, so several iterations share one factorization.
    """
    image = target @ hessian
    d, v, penalty = start, torch.zeros_like(start), how.penalty
    solve = mask = None
    for iteration in range(how.mask_iterations):
        if iteration and iteration % how.every == 0:
            penalty, solve = penalty * how.growth, None
        if solve is None:
            solve = _penalised_inverse(hessian, penalty)
        b = torch.lerp(d, (image - v).add_(d, alpha=penalty) @ solve, how.relaxation)
        moved = b.add(v, alpha=1 / penalty)
        parts = zip(sparsities, moved.split(rows), strict=True)
        mask = torch.cat([sparsity.select(part.abs()) for sparsity, part in parts])
        d = moved.masked_fill(mask, 0)
        v = v.add_(b.sub_(d), alpha=penalty)
    return d, mask


def _penalised_inverse(hessian: Tensor, penalty: float) -> Tensor:
    """Return (H + ρI)⁻¹, (columns, columns).

    The result is meaningless if H is not positive semidefinite; :func:`refine` then rejects the refinement.
    """
    shifted = hessian.clone()
    shifted.diagonal().add_(penalty)
    lower, _ = torch.linalg.cholesky_ex(shifted, check_errors=False)
    return torch.cholesky_inverse(lower)


def conjugate_gradient(
    weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, steps: int, tolerance: float = 0.0
) -> Tensor:
    """Minimize tr((W−V) H (W−V)ᵀ) over the kept entries of V by conjugate gradient.

    Each row is an independent problem (H restricted to its kept columns); all rows step together. A step costs one product of
    rows × columns² operations. A row stops once its residual reaches rounding error, since further steps would follow noise
    and increase its error.

    Args:
        weight: initial V, (rows, columns), zero where pruned.
        target: W, (rows, columns).
        mask: bool, (rows, columns), True where pruned.
        hessian: H, (columns, columns), with a constant diagonal, since conjugate gradient is not preconditioned.
        steps: maximum number of steps.
        tolerance: a row stops once the norm of its residual is below this fraction of the norm of W H.

    Returns:
        The refined V, a new tensor, zero where pruned.
    """
    kept = ~mask
    v = weight.clone()
    residual = ((target - v) @ hessian) * kept
    direction = residual.clone()
    power = residual.square().sum(dim=1, keepdim=True)  # (rows, 1)
    epsilon = torch.finfo(v.dtype).eps
    target_power = (target @ hessian).square().sum(dim=1, keepdim=True)
    floor = torch.maximum(epsilon * power, max(8 * epsilon, tolerance) ** 2 * target_power)
    for _ in range(steps):
        image = (direction @ hessian) * kept
        curvature = (direction * image).sum(dim=1, keepdim=True)
        active = (curvature > 0) & (power > floor)  # elsewhere the row has converged
        step = torch.where(active, power / curvature, torch.zeros_like(power))
        v.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        next_power = residual.square().sum(dim=1, keepdim=True)
        growth = torch.where(power > 0, next_power / power, torch.zeros_like(power))
        direction = torch.addcmul(residual, growth, direction)
        power = next_power
    return v
