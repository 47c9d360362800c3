"""OATS (Zhang and Papyan, 2025): approximates a layer by a sparse plus a low-rank matrix, with norm-weighted channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from ..bounds import Positive
from ..footprint import Working
from ..patterns import Sparsity, Unstructured
from .base import Layer, Method, Solution, drop


@dataclass(frozen=True)
class OATS(Method):
    """Alternates between L, the best approximation of W·D − S of rank r, and S, the largest entries of each row of W·D − L,
    where D = diag(sqrt(E[x²])); the layer becomes (S + L)·D⁻¹.

    For a sparsity p, r = int(κ(1−p)·n·m / (n+m)) of an n × m layer, and S keeps a share (1−κ)(1−p) of each row, so that both
    store as many numbers as a share 1−p of the weights. For N:M, S has the pattern and L is added on top, as in the authors'
    code; the layer is then less sparse than the pattern, and the result reports its stored size. Weights on dead columns cost
    nothing; those kept in S are unchanged.

    Args:
        rank_ratio: κ, the fraction of the stored numbers that L takes; the authors use 0.25 for language models.
        iterations: number of alternations between L and S.
    """

    sparse = False

    rank_ratio: Annotated[float, Ge(0), Lt(1)] = 0.25
    iterations: Positive = 80

    def working(self, sparsity: Sparsity) -> tuple[Working, ...]:
        if isinstance(sparsity, Unstructured):
            return (Working(squares=1.05, kept=1.35, largest=8.9),)
        return (Working(squares=1, kept=1.25, largest=6, smaller=3),)

    def prune(self, layer: Layer) -> Solution:
        rows, columns = layer.weight.shape
        if layer.sparsity.ratio == 0:  # unchanged, not approximated
            return Solution(layer.weight.clone(), torch.zeros_like(layer.weight, dtype=torch.bool))
        rank, pattern = self.split(layer.sparsity, rows, columns)
        scale = layer.curvature.norms
        scaled = layer.weight * scale  # W·D
        sparse = torch.zeros_like(scaled)
        mask = torch.ones_like(scaled, dtype=torch.bool)
        part = torch.zeros_like(scaled)
        for _ in range(self.iterations):
            part = low_rank(scaled - sparse, rank)
            rest = scaled - part
            mask = pattern.select_by_row(rest.abs())
            sparse = drop(rest, mask)
        dead = scale == 0
        weight = (sparse + part) / scale.masked_fill(dead, 1)
        return Solution(torch.where(dead, drop(layer.weight, mask), weight), mask, rank=rank)

    def split(self, sparsity: Sparsity, rows: int, columns: int) -> tuple[int, Sparsity]:
        """Return the rank of L and the sparsity pattern of S."""
        if isinstance(sparsity, Unstructured):
            kept = 1 - sparsity.ratio
            pattern: Sparsity = Unstructured(1 - (1 - self.rank_ratio) * kept)
        else:
            kept, pattern = (1 - sparsity.ratio) / (1 - self.rank_ratio), sparsity
        return int(self.rank_ratio * kept * rows * columns / (rows + columns)), pattern


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of ``matrix`` (n, m) of rank at most ``rank``.

    Uses the eigenvectors of the smaller Gram matrix. This takes a third of the time of a singular value decomposition and is
    as accurate unless the kept singular values are tiny. The matrix is first scaled by a power of two, so that its squares
    stay within the range of the precision; this leaves the eigenvectors bitwise unchanged.

    Raises:
        LinAlgError: if the eigenvalue solver fails.
    """
    if not rank:
        return torch.zeros_like(matrix)
    wide = matrix.shape[0] < matrix.shape[1]
    low, high = torch.aminmax(matrix)
    exponent = torch.frexp(torch.maximum(-low, high)).exponent
    unit = matrix * torch.ldexp(torch.ones_like(matrix[0, 0]), -exponent)  # of entries up to 1
    gram = unit @ unit.T if wide else unit.T @ unit
    kept = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # in ascending order
    return kept @ (kept.T @ matrix) if wide else (matrix @ kept) @ kept.T
