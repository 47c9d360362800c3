"""SparseGPT (Frantar and Alistarh, 2023), and ROSE, which adds an ordering: the OBS sweep over ordered columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..footprint import Working
from ..kernels.backends import kernels_for
from ..patterns import Sparsity
from ..sweep import sweep
from .base import Layer, Method, Solution


@dataclass(frozen=True)
class SparseGPT(Method):
    """Prunes by the OBS sweep. Weights on dead columns cost nothing: they are pruned first, and kept ones are unchanged."""

    sequential = True
    retained = Working(squares=1, kept=1, largest=0.5)  # the factor and the transposed weight

    def working(self, sparsity: Sparsity) -> tuple[Working, ...]:
        return (Working(squares=2, kept=2.25, largest=2),)

    def prune(self, layer: Layer) -> Solution:
        reordered = bool(layer.order.reordered) if layer.reordered is None else layer.reordered
        order, alive, weight = layer.order.order, ~layer.dead, layer.weight
        some_dead = weight.device.type != "cpu" or not alive.all()  # reading alive would synchronize a GPU
        start = layer.transposed * alive[:, None] if some_dead else layer.transposed
        w = start.index_select(0, order) if reordered else start.clone()  # (columns, rows), in pruning order
        factor = layer.curvature.factor_in(order) if reordered else layer.factor
        kernels = kernels_for(layer.backend, weight)
        mask, costs = sweep(w, factor.upper, layer.sparsity, layer.order.widths(reordered), layer.block_size, kernels)
        if reordered:
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            w, mask = w.index_select(0, back), mask.index_select(0, back)
        swept, mask = w.T.contiguous(), mask.T.contiguous()
        change = weight - swept
        if some_dead:
            change *= alive
            swept = torch.where(alive | mask, swept, weight)
        # the sweep's cost is that of the damped Hessian: tr(D (H + λI) Dᵀ), D the change of the columns alive
        lost = costs.sum() - factor.shift * torch.linalg.vecdot(change.flatten(), change.flatten())
        return Solution(swept, mask, factor, lost, costs)
