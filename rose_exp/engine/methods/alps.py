"""ALPS (Meng et al., 2024): masks chosen over a whole layer by ADMM, then conjugate gradient on the mask found.

With columns scaled so that the damped Hessian H has a diagonal of 1, ADMM holds two copies of the layer, B that fits the output
and D that is pruned, with multipliers V between them:

    B ← (H W − V + ρD) (H + ρI)⁻¹        D ← the largest entries of B + V/ρ        V ← V + ρ (B − D)

ρ grows with how much of the mask still changes, on the schedule of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..refine import conjugate_gradient
from .base import Layer, Method, Solution, drop

LARGEST_PENALTY = 1e6
TOLERANCE = 1e-4  # of conjugate gradient, as the authors have it


@dataclass(frozen=True)
class ALPS(Method):
    """Defaults are those of the authors' own code. Unstructured weights are compared over the whole layer. H is damped by the
    damping that :func:`rose_exp.engine.prune_layer` is told, whose default is the authors', too.

    Args:
        penalty: ρ at the start.
        max_iterations: of ADMM.
        check_every: iterations from one look at how much of the mask has changed to the next; each sets ρ anew.
        min_iterations: before the mask may count as settled.
        tolerance: it has settled where less than this share of the kept weights has changed.
        steps: of conjugate gradient on the mask found.
    """

    working = (12.0, 8.0)

    penalty: float = 0.1
    max_iterations: int = 300
    check_every: int = 3
    min_iterations: int = 30
    tolerance: float = 3e-4
    steps: int = 10

    def __post_init__(self):
        for name in ("penalty", "tolerance"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        for name, least in (("max_iterations", 1), ("check_every", 1), ("min_iterations", 0), ("steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def prune(self, layer: Layer) -> Solution:
        hessian, scale = layer.curvature.normalised(layer.curvature.damping)
        dense, sparsity = layer.weight * scale, layer.sparsity
        mask = sparsity.select(dense.abs())
        if not 0 < int(mask.sum()) < mask.numel():  # there is nothing to choose
            return Solution(drop(layer.weight, mask), mask, damped=True)
        fitting = self._alternate(layer, dense, hessian, mask)
        mask = sparsity.select(fitting.abs())
        weight = conjugate_gradient(drop(fitting, mask), dense, mask, hessian, self.steps, TOLERANCE)
        weight = torch.where(layer.dead, drop(layer.weight, mask), weight / scale)  # what stays there keeps its value
        return Solution(weight, mask, damped=True)

    def _alternate(self, layer: Layer, dense: Tensor, hessian: Tensor, before: Tensor) -> Tensor:
        """B where ADMM ends, (rows, columns), from the mask ``before``."""
        inverse, select, penalty = layer.curvature.penalised_inverse, layer.sparsity.select, self.penalty
        image = dense @ hessian
        start = drop(dense, before)
        b, d, v = dense, start, torch.zeros_like(dense)
        begun = False  # until the mask has changed for the first time, ρ is lowered, and ADMM begun anew
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
    """By how much ρ grows, from the share of the kept weights by which the mask has changed."""
    return 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
