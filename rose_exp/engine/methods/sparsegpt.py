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
        moved = order.device.type != "cpu" or bool(found.reordered)  # asking a GPU would wait for it
        weight = layer.weight.masked_fill(layer.dead, 0).T
        if moved:
            w = weight.index_select(0, order)  # (columns, rows)
            factor = factorise(layer.hessian.index_select(0, order).index_select(1, order), layer.damping)
        else:
            w, factor = weight.clone(memory_format=torch.contiguous_format), layer.factor
        mask = sweep(w, factor.upper, layer.sparsity, found.widths, layer.block_size, layer.backend)
        if moved:
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            w, mask = w.index_select(0, back), mask.index_select(0, back)
        mask = mask.T.contiguous()
        swept = torch.where(layer.dead & ~mask, layer.weight, w.T)
        return Solution(swept, mask, found, factor.damping)
