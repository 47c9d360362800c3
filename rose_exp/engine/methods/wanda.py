"""Wanda (Sun et al., 2024): weight times activation norm, compared within each output row; weights are not updated."""

from __future__ import annotations

from dataclasses import dataclass

from ..footprint import Working
from ..patterns import SemiStructured, Sparsity
from .base import Layer, Method, Solution, drop


@dataclass(frozen=True)
class Wanda(Method):
    """Prunes the smallest |W|·sqrt(E[x²]) of each row; all calibration tokens count equally."""

    def working(self, sparsity: Sparsity) -> tuple[Working, ...]:
        return (Working(squares=1, kept=1.25, largest=1 if isinstance(sparsity, SemiStructured) else 4.25),)

    def prune(self, layer: Layer) -> Solution:
        mask = layer.sparsity.select_by_row(layer.scores("wanda"))
        return Solution(drop(layer.weight, mask), mask)
