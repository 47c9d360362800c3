"""Streaming second moments of a layer's inputs: all that the pruning methods need to know of the calibration data."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .pieces import TokenPieces
from .products import Precision, add_gram, mirror


class InputMoments:
    """Sums over calibration tokens of ``x xᵀ``, ``x`` and 1, from which every statistic is derived.

    Every token counts the same: H = 2·E[x xᵀ], and the Wanda norm is sqrt(E[x²]), with no decay. On a CPU the sums are equal
    bit for bit however the tokens are split into updates: they are kept in float64 and computed from pieces of a fixed number
    of tokens. Reading a sum ends the piece at hand. On other devices the split changes the rounding.

    Args:
        columns: width of the layer's input.
        device: where the sums are kept; inputs are moved there.
        dtype: float32 or float64, of the products and of the statistics; inputs of any float type are converted first.
        precision: of the products of float32 inputs where ``dtype`` is float32. ``float32``: none is rounded further.
            ``tf32``: inputs are rounded to 10 bits of mantissa, on CUDA. ``bf16x2``: each input is split into two bfloat16,
            16 bits together, and the product of the two small parts is left out. Half-precision inputs are never rounded;
            CUDA tensor cores multiply them as they are.
    """

    def __init__(
        self,
        columns: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        precision: Precision = "float32",
    ):
        if columns < 1:
            raise ValueError(f"columns: expected at least 1, got {columns}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}")
        self.columns = columns
        self.precision = precision
        self.dtype = dtype
        sums = sums_dtype(device, dtype)
        self._gram = torch.zeros(columns, columns, device=device, dtype=sums)  # Σ w x xᵀ; below the diagonal only when read
        self._mirrored = True
        self._sum = torch.zeros(columns, device=device, dtype=sums)  # Σ w x
        self._pieces = TokenPieces(dtype)
        self.weight = 0.0  # Σ w, over tokens
        self.tokens = 0

    @property
    def gram(self) -> Tensor:
        """Σ w x xᵀ, (columns, columns); float64 on a CPU, elsewhere ``dtype``."""
        self._finish_piece()
        if not self._mirrored:
            mirror(self._gram)
            self._mirrored = True
        return self._gram

    @property
    def sum(self) -> Tensor:
        """Σ w x, (columns,), of the type of :attr:`gram`."""
        self._finish_piece()
        return self._sum

    @property
    def device(self) -> torch.device:
        return self._gram.device

    @torch.no_grad()
    def update(self, inputs: Tensor, weight: float = 1.0) -> None:
        """Add the tokens of ``inputs`` (..., columns), each counted ``weight`` times.

        Raises:
            ValueError: a last dimension other than ``columns``, a type that is not floating, or a negative weight.
        """
        if inputs.ndim == 0 or inputs.shape[-1] != self.columns:
            raise ValueError(f"inputs: expected shape (..., {self.columns}), got {tuple(inputs.shape)}")
        if not inputs.is_floating_point():
            raise ValueError(f"inputs: expected a floating type, got {inputs.dtype}")
        if not weight >= 0:
            raise ValueError(f"weight: expected a number of at least 0, got {weight}")
        tokens = inputs.reshape(-1, self.columns).to(self.device)  # (tokens, columns)
        if self.device.type == "cpu":
            for (piece,), of_piece in self._pieces.push([tokens], weight):
                self._add(piece, of_piece)
        else:
            self._add(tokens, weight)
        self.weight += weight * len(tokens)
        self.tokens += len(tokens)

    def _add(self, tokens: Tensor, weight: float) -> None:
        add_gram(self._gram, tokens, weight, self.precision, self.dtype)
        self._mirrored = False
        self._sum.add_(tokens.sum(dim=0, dtype=self._sum.dtype), alpha=weight)

    @torch.no_grad()
    def _finish_piece(self) -> None:
        for (piece,), weight in self._pieces.rest():
            self._add(piece, weight)

    def to(self, device: torch.device | str) -> InputMoments:
        """Move the sums to ``device``; this object."""
        self._finish_piece()
        self._gram, self._sum = self._gram.to(device), self._sum.to(device)
        return self

    def finish(self) -> None:
        """Round the sums to ``dtype``, which halves the memory of float64 sums of float32 products. No update may follow."""
        self._finish_piece()
        self._gram = self.gram.to(self.dtype)

    def permuted(self, order: Tensor) -> InputMoments:
        """Those of the same inputs with their columns in another order (columns,) int64; a new object."""
        other = InputMoments(self.columns, device="meta", dtype=self.dtype, precision=self.precision)
        other._gram, other._sum = self.gram[order][:, order], self.sum[order]
        other.weight, other.tokens = self.weight, self.tokens
        return other

    def merge(self, other: InputMoments) -> None:
        """Add what ``other`` has seen, as if its inputs had come here."""
        if other.columns != self.columns:
            raise ValueError(f"other: expected moments of {self.columns} columns, got {other.columns}")
        self.gram.add_(other.gram.to(self._gram))
        self._sum += other.sum.to(self._sum)
        self.weight += other.weight
        self.tokens += other.tokens

    def hessian(self) -> Tensor:
        """H = 2·E[x xᵀ] of the layer-wise squared error, (columns, columns). A new tensor."""
        result = torch.empty_like(self._gram, dtype=self.dtype)
        return torch.mul(self.gram, 2 / self._total, out=result)

    def mean_square(self) -> Tensor:
        """E[x²] of each column, (columns,): the square of Wanda's activation norm, up to the number of tokens."""
        return (self.gram.diagonal() / self._total).to(self.dtype)

    def mean(self) -> Tensor:
        """E[x] of each column, (columns,)."""
        return (self.sum / self._total).to(self.dtype)

    def variance(self) -> Tensor:
        """E[x²] − E[x]² of each column, (columns,), never negative."""
        variance = self.gram.diagonal() / self._total - (self.sum / self._total).square()
        return variance.clamp_min_(0).to(self.dtype)

    @property
    def _total(self) -> float:
        return self.weight or 1.0  # nothing seen: all sums are zero, and so are all statistics

    def __repr__(self) -> str:
        return f"InputMoments(columns={self.columns}, tokens={self.tokens})"


def sums_dtype(device: torch.device | str | None, dtype: torch.dtype) -> torch.dtype:
    """The type in which sums of products of ``dtype`` are kept on ``device``.

    Float64 on a CPU, where it costs little. On a GPU it would double the memory of the Hessians and slow every update.
    """
    return torch.float64 if torch.device(device or "cpu").type == "cpu" else dtype
