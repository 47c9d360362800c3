"""SparseGPT (Frantar and Alistarh, 2023), and with an ordering ROSE: the OBS sweep over ordered columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..sweep import sweep
from .base import Layer, Method, Solution


@dataclass(frozen=True)
class SparseGPT(Method):
    """Weights on a column that never fired cost nothing: they go first, and those that stay keep their value."""

    sequential = True

    def prune(self, layer: Layer) -> Solution:
        moved = bool(layer.order.reordered) if layer.moved is None else layer.moved
        order, alive = layer.order.order, ~layer.dead
        start = layer.weight.T * alive[:, None]  # (columns, rows)
        w = start.index_select(0, order) if moved else start.clone(memory_format=torch.contiguous_format)
        factor = layer.curvature.factor_in(order) if moved else layer.factor
        mask, error = sweep(w, factor.upper, layer.sparsity, layer.order.widths(moved), layer.block_size, layer.backend)
        if moved:
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            w, mask = w.index_select(0, back), mask.index_select(0, back)
        # the sweep's error is that of the damped Hessian: tr(D (H + λI) Dᵀ) with D = W − V
        lost = error - factor.shift * (start - w).square_().sum()
        mask = mask.T.contiguous()
        swept = torch.where(alive | mask, w.T, layer.weight)
        return Solution(swept, mask, factor, lost)
