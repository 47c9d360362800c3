"""ALPS (Meng et al., 2024): selects the mask of a whole layer by ADMM, then fits the kept weights by conjugate gradient.

Columns are scaled so that the damped Hessian H has a unit diagonal. ADMM keeps two copies of the layer, B that fits the output
and D that is pruned, coupled by multipliers V:

    B ← (H W − V + ρD) (H + ρI)⁻¹        D ← the largest entries of B + V/ρ        V ← V + ρ (B − D)

ρ grows by a factor that depends on how much the mask still changes, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import AboveZero, Count, Positive
from ..footprint import Working
from ..patterns import Sparsity
from ..refine import conjugate_gradient
from .base import Layer, Method, Solution, drop

LARGEST_PENALTY = 1e6
TOLERANCE = 1e-4  # of conjugate gradient, from the authors' code


@dataclass(frozen=True)
class ALPS(Method):
    """ALPS with the defaults of the authors' code.

    Unstructured weights are compared over the whole layer. H is damped by the ``damping`` of
    :func:`rose_exp.engine.prune_layer`, whose default is also the authors'.

    Args:
        penalty: initial ρ.
        max_iterations: maximum number of ADMM iterations.
        check_every: number of iterations between checks of how much the mask has changed; each check updates ρ.
        min_iterations: number of iterations before the mask may count as converged.
        tolerance: the mask has converged once fewer than this fraction of the kept weights change.
        steps: number of conjugate gradient steps on the final mask.
    """

    retained = Working(squares=2)  # eigenvectors in float64

    penalty: AboveZero = 0.1
    max_iterations: Positive = 300
    check_every: Positive = 3
    min_iterations: Count = 30
    tolerance: AboveZero = 3e-4
    steps: Count = 10

    def working(self, sparsity: Sparsity) -> tuple[Working, ...]:
        return Working(squares=9, kept=1.25, largest=6.25), Working(squares=5, kept=1.25, largest=9.5)

    def prune(self, layer: Layer) -> Solution:
        hessian, scale = layer.curvature.normalized(layer.curvature.damping)
        dense, sparsity = layer.weight * scale, layer.sparsity
        mask = sparsity.select(dense.abs())
        if not 0 < int(mask.sum()) < mask.numel():  # all or nothing is pruned
            return Solution(drop(layer.weight, mask), mask, damped=True)
        fitting = self._alternate(layer, dense, hessian, mask)
        mask = sparsity.select(fitting.abs())
        weight = conjugate_gradient(drop(fitting, mask), dense, mask, hessian, self.steps, TOLERANCE)
        weight = torch.where(layer.dead, drop(layer.weight, mask), weight / scale)  # kept weights of dead columns are unchanged
        return Solution(weight, mask, damped=True)

    def _alternate(self, layer: Layer, dense: Tensor, hessian: Tensor, before: Tensor) -> Tensor:
        """Run ADMM from the mask ``before`` and return the final B, (rows, columns)."""
        inverse, select, penalty = layer.curvature.penalised_inverse, layer.sparsity.select, self.penalty
        image = dense @ hessian
        start = drop(dense, before)
        b, d, v = dense, start, torch.zeros_like(dense)
        begun = False  # until the mask first changes, ρ is lowered and ADMM restarts
        kept = before.numel() - int(before.sum())
        solve = inverse(penalty)
        for iteration in range(1, self.max_iterations + 1):
            b = (image - v + penalty * d) @ solve
            moved = b + v / penalty
            mask = select(moved.abs())
            d = drop(moved, mask)
            v = v + penalty * (b - d)
            if iteration % self.check_every:
                continue
            changed = int((mask != before).sum())
            before = mask
            if changed > 0 and not begun and changed <= 0.005 * kept:
                penalty /= 5
                b, d, v = dense, start, torch.zeros_like(dense)
            elif changed == 0:
                if begun:
                    break
                penalty /= 5
            else:
                begun = True
                penalty = min(penalty * _growth(changed / kept), LARGEST_PENALTY)
            if iteration > self.min_iterations and changed < self.tolerance * kept:
                break
            solve = inverse(penalty)
        return b


def _growth(changed: float) -> float:
    """Return the growth factor of ρ, given the change of the mask as a fraction of the kept weights."""
    return 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
