"""Magnitude pruning: prunes the smallest weights, regardless of their inputs."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Layer, Method, Solution, drop


@dataclass(frozen=True)
class Magnitude(Method):
    """Compares unstructured weights over the whole layer, as in the baseline of SparseGPT and Wanda."""

    working = (0.9, 6.5)

    def prune(self, layer: Layer) -> Solution:
        mask = layer.sparsity.select(layer.scores("magnitude"))
        return Solution(drop(layer.weight, mask), mask)
