"""SparseGPT (Frantar and Alistarh, 2023), and with an ordering ROSE: the OBS sweep over ordered columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..hessian import factorise
from ..sweep import sweep
from .base import Layer, Method, Solution


@dataclass(frozen=True)
class SparseGPT(Method):
    """Weights on a column that never fired cost nothing: they go first, and those that stay keep their value."""

    sequential = True

    def prune(self, layer: Layer) -> Solution:
        found = layer.column_order()
        order = found.order
        factor = factorise(layer.hessian[order][:, order], layer.damping)
        weight = layer.weight.masked_fill(layer.dead, 0)[:, order]
        swept, mask = sweep(weight, factor.upper, layer.sparsity, found.widths, layer.block_size)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        swept, mask = swept[:, back], mask[:, back]
        swept = torch.where(layer.dead & ~mask, layer.weight, swept)
        return Solution(swept, mask, found, factor.damping)
