"""What is made better of a layer once it is pruned: its mask is chosen again over the whole layer, and the weights that are
kept are fitted to the layer's output.

Everything here has the columns scaled by sqrt(diag H), so that H has a diagonal of 1: no column counts for more because its
inputs are large, and conjugate gradient needs no preconditioner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .curvature import Curvature
from .patterns import Sparsity
from .products import quadratic_form


@dataclass(frozen=True)
class Refine:
    """How a pruned layer is refined. ``Refine(8)`` fits the kept weights in 8 steps; ``Refine(8, mask_iterations=20)`` chooses
    the mask again before.

    Args:
        steps: of least squares on the mask, by conjugate gradient.
        tolerance: a row stops where the norm of its gradient is below this share of what it would be were all weights pruned.
        damping: of H in what is lowered, tr((W−V)(H + λI)(W−V)ᵀ), as a share of the mean of its diagonal: what holds the kept
            weights near those of the layer, and keeps them from fitting the calibration text alone.
        mask_iterations: of ADMM over the whole layer, from the pruned weights; 0: the mask stays. A layer that ends with a
            larger error than it had is left as it was pruned, and says so.
        penalty: ADMM's ρ at the start.
        growth: of ρ every so many iterations.
        every: so many iterations.
        relaxation: of ADMM, 1 to 2, 1 is none: what is solved for is taken so much further from the pruned weights (Boyd et
            al., 2011, section 3.4.3).
    """

    working: ClassVar[tuple[float, float]] = (2.0, 20.0)
    """As that of a method: measured with ``mask_iterations``, without it takes less."""

    steps: int = 8
    tolerance: float = 1e-4
    damping: float = 0.0
    mask_iterations: int = 0
    penalty: float = 0.2
    growth: float = 2.0
    every: int = 4
    relaxation: float = 1.6

    def __post_init__(self):
        for name, least in (("steps", 0), ("mask_iterations", 0), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("tolerance", "damping"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")
        if not 0 < self.penalty < float("inf"):
            raise ValueError(f"penalty: expected a finite number above 0, got {self.penalty}")
        if not 1 <= self.growth < float("inf"):
            raise ValueError(f"growth: expected a finite number of at least 1, got {self.growth}")
        if not 1 <= self.relaxation < 2:
            raise ValueError(f"relaxation: expected a number from 1 to below 2, got {self.relaxation}")

    def __bool__(self) -> bool:
        return self.steps > 0 or self.mask_iterations > 0


@dataclass(frozen=True)
class Refined:
    """One refined layer.

    Attributes:
        weight, mask: (rows, columns).
        rechosen: weights that the mask has swapped, an int64 tensor of no dimensions.
        taken: whether the layer is refined, and not left as it was, a bool tensor of no dimensions.
    """

    weight: Tensor
    mask: Tensor
    rechosen: Tensor
    taken: Tensor


def refine(
    weights: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor],
    curvature: Curvature,
    sparsities: Sequence[Sparsity],
    how: Refine,
) -> list[Refined]:
    """Refine pruned layers that share their inputs; nothing is waited for.

    Args:
        weights: V of each layer, (rows, columns), zero where pruned.
        targets: W that each is to come near to.
        masks: bool, True where pruned.
        curvature: of the inputs. H is damped as ``how`` says, not as the curvature does.
        sparsities: of each layer's mask, should it be chosen again.
    """
    hessian, scale = curvature.normalised(how.damping)
    rows = [len(weight) for weight in weights]
    target, start = torch.cat(list(targets)) * scale, torch.cat(list(weights)) * scale  # side by side: one product for all
    mask = torch.cat(list(masks))
    chosen, first = mask, start
    if how.mask_iterations:
        first, chosen = _choose_again(start, target, hessian, sparsities, rows, how)
    found = conjugate_gradient(first, target, chosen, hessian, how.steps, how.tolerance)
    refined = []
    layers = zip(*(x.split(rows) for x in (target, start, mask, found, chosen)), targets, weights, strict=True)
    for goal, old, old_mask, new, new_mask, plain, pruned in layers:
        error = quadratic_form(goal - new, hessian)
        better = (error <= quadratic_form(goal - old, hessian)) & torch.isfinite(error)
        new = torch.where(curvature.dead, plain.masked_fill(new_mask, 0), new / scale)  # what stays there keeps its value
        weight, final = torch.where(better, new, pruned), torch.where(better, new_mask, old_mask)
        refined.append(Refined(weight, final, (final & ~old_mask).sum(), better))
    return refined


def _choose_again(
    start: Tensor, target: Tensor, hessian: Tensor, sparsities: Sequence[Sparsity], rows: Sequence[int], how: Refine
) -> tuple[Tensor, Tensor]:
    """Pruned weights and their masks from ADMM over layers that stand below each other, (rows of all, columns).

    The steps are those of ALPS (see :mod:`rose_exp.engine.methods.alps`). But ADMM begins where another method has ended, so
    that a few iterations do, and ρ grows whatever the masks do, so that one factor serves several of them.
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
    """(H + ρI)⁻¹, (columns, columns); of no meaning where H is not positive semidefinite, which the guard of :func:`refine`
    sees."""
    shifted = hessian.clone()
    shifted.diagonal().add_(penalty)
    lower, _ = torch.linalg.cholesky_ex(shifted, check_errors=False)
    return torch.cholesky_inverse(lower)


def conjugate_gradient(
    weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, steps: int, tolerance: float = 0.0
) -> Tensor:
    """Lower tr((W−V) H (W−V)ᵀ) over the kept entries of V.

    Every row is a problem of its own (H restricted to its kept columns), all are stepped at once; a step costs one product
    rows × columns². A row whose residual is down to rounding is left alone: further steps would follow noise, and raise its
    error.

    Args:
        weight: V to start from, (rows, columns), zero where pruned.
        target: W, (rows, columns).
        mask: bool, (rows, columns), True where pruned.
        hessian: H, (columns, columns), its diagonal all of one size: conjugate gradient is not preconditioned.
        steps: at most.
        tolerance: a row stops where the norm of its residual is below this share of that of H W.

    Returns:
        The refined V, a new tensor, zero where pruned.
    """
    kept = ~mask
    v = weight.clone()
    residual = ((target - v) @ hessian) * kept
    direction = residual.clone()
    power = residual.square().sum(dim=1, keepdim=True)  # (rows, 1)
    epsilon = torch.finfo(v.dtype).eps
    whole = (target @ hessian).square().sum(dim=1, keepdim=True)
    floor = torch.maximum(epsilon * power, max(8 * epsilon, tolerance) ** 2 * whole)
    for _ in range(steps):
        image = (direction @ hessian) * kept
        curvature = (direction * image).sum(dim=1, keepdim=True)
        going = (curvature > 0) & (power > floor)  # elsewhere the row has converged
        step = torch.where(going, power / curvature, torch.zeros_like(power))
        v.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        following = residual.square().sum(dim=1, keepdim=True)
        growth = torch.where(power > 0, following / power, torch.zeros_like(power))
        direction = torch.addcmul(residual, growth, direction)
        power = following
    return v
