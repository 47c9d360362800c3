"""Magnitude pruning: the smallest weights go, whatever their inputs are."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Layer, Method, Solution, drop


@dataclass(frozen=True)
class Magnitude(Method):
    """Unstructured weights are compared over the whole layer, as the baseline of SparseGPT and Wanda does."""

    working = (0.9, 6.5)

    def prune(self, layer: Layer) -> Solution:
        mask = layer.sparsity.select(layer.scores("magnitude"))
        return Solution(drop(layer.weight, mask), mask)
