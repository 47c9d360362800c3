"""Magnitude pruning: prunes the smallest weights, regardless of their inputs."""

from __future__ import annotations

from dataclasses import dataclass

from ..footprint import Working
from ..patterns import Sparsity
from .base import Layer, Method, Solution, drop


@dataclass(frozen=True)
class Magnitude(Method):
    """Compares unstructured weights over the whole layer, as in the baseline of SparseGPT and Wanda."""

    def working(self, sparsity: Sparsity) -> tuple[Working, ...]:
        return (Working(squares=1, kept=1.25, largest=1),)

    def prune(self, layer: Layer) -> Solution:
        mask = layer.sparsity.select(layer.scores("magnitude"))
        return Solution(drop(layer.weight, mask), mask)
