"""Streaming second moments of a layer's inputs, the only calibration statistics that the pruning methods use."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .pieces import TokenPieces
from .products import Precision, add_gram, mirror


class InputMoments:
    """Accumulates ``x xᵀ``, ``x`` and 1 over calibration tokens; every statistic is derived from these sums.

    All tokens count equally, without decay: H = 2·E[x xᵀ], and the Wanda norm is sqrt(E[x²]). On a CPU the sums are bitwise
    independent of how the tokens are split into updates: they are kept in float64 and computed from pieces of a fixed number
    of tokens. Reading a sum ends the current piece. On other devices the split affects rounding.

    Args:
        columns: width of the layer's input.
        device: device of the sums; inputs are moved there.
        dtype: dtype of the products and statistics, float32 or float64; inputs of any floating dtype are converted to it.
        precision: precision of the products of float32 inputs if ``dtype`` is float32. ``float32``: no further rounding.
            ``tf32``: inputs are rounded to 10 mantissa bits, on CUDA. ``bf16x2``: each input is split into two bfloat16
            numbers (16 bits in total), and the product of the two small parts is omitted. Half-precision inputs are never
            rounded; CUDA tensor cores multiply them directly.
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
        self._gram = torch.zeros(columns, columns, device=device, dtype=sums)  # Σ w x xᵀ; lower triangle filled on reading
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
        """Σ w x, (columns,), in the dtype of :attr:`gram`."""
        self._finish_piece()
        return self._sum

    @property
    def device(self) -> torch.device:
        return self._gram.device

    @torch.no_grad()
    def update(self, inputs: Tensor, weight: float = 1.0) -> None:
        """Add the tokens of ``inputs`` (..., columns), each counted ``weight`` times.

        Raises:
            ValueError: if the last dimension is not ``columns``, the dtype is not floating, or the weight is negative.
        """
        if inputs.ndim == 0 or inputs.shape[-1] != self.columns:
            raise ValueError(f"inputs: expected shape (..., {self.columns}), got {tuple(inputs.shape)}")
        if not inputs.is_floating_point():
            raise ValueError(f"inputs: expected a floating type, got {inputs.dtype}")
        if not weight >= 0:
            raise ValueError(f"weight: expected a number of at least 0, got {weight}")
        tokens = inputs.reshape(-1, self.columns).to(self.device)  # (tokens, columns)
        if self.device.type == "cpu":
            for (piece,), piece_weight in self._pieces.push([tokens], weight):
                self._add(piece, piece_weight)
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
        """Move the sums to ``device`` in place and return this object."""
        self._finish_piece()
        self._gram, self._sum = self._gram.to(device), self._sum.to(device)
        return self

    def finish(self) -> None:
        """Round the sums to ``dtype``, which halves the memory of float64 sums. Call it after the last update."""
        self._finish_piece()
        self._gram = self.gram.to(self.dtype)

    def permuted(self, order: Tensor) -> InputMoments:
        """Return the moments of the same inputs with their columns in the given order, (columns,) int64."""
        other = InputMoments(self.columns, device="meta", dtype=self.dtype, precision=self.precision)
        other._gram, other._sum = self.gram[order][:, order], self.sum[order]
        other.weight, other.tokens = self.weight, self.tokens
        return other

    def merge(self, other: InputMoments) -> None:
        """Add the sums of ``other``."""
        if other.columns != self.columns:
            raise ValueError(f"other: expected moments of {self.columns} columns, got {other.columns}")
        self.gram.add_(other.gram.to(self._gram))
        self._sum += other.sum.to(self._sum)
        self.weight += other.weight
        self.tokens += other.tokens

    def hessian(self) -> Tensor:
        """Return H = 2·E[x xᵀ], the Hessian of the layer-wise squared error, (columns, columns), as a new tensor."""
        result = torch.empty_like(self._gram, dtype=self.dtype)
        return torch.mul(self.gram, 2 / self._total, out=result)

    def mean_square(self) -> Tensor:
        """Return E[x²] of each column, (columns,): the squared activation norm of Wanda divided by the number of tokens."""
        return (self.gram.diagonal() / self._total).to(self.dtype)

    def mean(self) -> Tensor:
        """Return E[x] of each column, (columns,)."""
        return (self.sum / self._total).to(self.dtype)

    def variance(self) -> Tensor:
        """Return E[x²] − E[x]² of each column, (columns,), never negative."""
        variance = self.gram.diagonal() / self._total - (self.sum / self._total).square()
        return variance.clamp_min_(0).to(self.dtype)

    @property
    def _total(self) -> float:
        return self.weight or 1.0  # without tokens, all sums and statistics are zero

    def __repr__(self) -> str:
        return f"InputMoments(columns={self.columns}, tokens={self.tokens})"


def sums_dtype(device: torch.device | str | None, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums of ``dtype`` products on ``device``.

    This is float64 on a CPU, where it costs little. On a GPU it would double the memory of Hessians and slow down updates.
    """
    return torch.float64 if torch.device(device or "cpu").type == "cpu" else dtype
