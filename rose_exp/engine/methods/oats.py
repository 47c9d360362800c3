"""OATS (Zhang and Papyan, 2025): a layer as a sparse plus a low-rank matrix, outlier channels weighed by their norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import Sparsity, Unstructured
from .base import Layer, Method, Solution, drop


@dataclass(frozen=True)
class OATS(Method):
    """Alternates between L, the best approximation of W·D − S of rank r, and S, the largest entries of each row of W·D − L,
    where D = diag(sqrt(E[x²])); the layer becomes (S + L)·D⁻¹.

    For a sparsity p, r = int(κ(1−p)·n·m / (n+m)) of an n × m layer, and S keeps a share (1−κ)(1−p) of each row, so that both
    together are as many numbers as a share 1−p of the weights. For N:M it is S that has the pattern, and L comes on top, as in
    the authors' code: the layer is then less sparse than the pattern says, and the result tells by how much. Weights on a
    column that never fired cost nothing: those that stay in S keep their value.

    Args:
        rank_ratio: κ, the share of the numbers kept that goes into L; 0.25 is the authors' own for language models.
        iterations: how often the two take turns.
    """

    sparse = False

    rank_ratio: float = 0.25
    iterations: int = 80

    def __post_init__(self):
        if not 0 <= self.rank_ratio < 1:
            raise ValueError(f"rank_ratio: expected at least 0 and below 1, got {self.rank_ratio}")
        if self.iterations < 1:
            raise ValueError(f"iterations: expected at least 1, got {self.iterations}")

    def prune(self, layer: Layer) -> Solution:
        rows, columns = layer.weight.shape
        if layer.sparsity.ratio == 0:  # as it is, not approximated
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
        """The rank of L, and the pattern of S."""
        if isinstance(sparsity, Unstructured):
            kept = 1 - sparsity.ratio
            pattern: Sparsity = Unstructured(1 - (1 - self.rank_ratio) * kept)
        else:
            kept, pattern = (1 - sparsity.ratio) / (1 - self.rank_ratio), sparsity
        return int(self.rank_ratio * kept * rows * columns / (rows + columns)), pattern


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of ``matrix`` (n, m) by one of rank at most ``rank``.

    It is computed from the eigenvectors of the smaller Gram matrix. That takes a third of the time of a singular value
    decomposition and is as good unless the singular values kept are tiny. The Gram matrix is that of the matrix times a power
    of two, so that its squares stay inside the range of the precision; this changes no bit of the eigenvectors.

    Raises:
        LinAlgError: the eigenvectors cannot be found.
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
