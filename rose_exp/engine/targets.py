"""Regression targets that compensate for the errors of the layers pruned before.

A layer of a partly pruned model receives the input x, where the dense model would give it x + δ. Asymmetric calibration, as in
GPTAQ (Li et al., 2025), fits V x ≈ W (x + δ). A layer whose output is added to the hidden states can also compensate for their
residual ε, the dense minus the pruned hidden states, by fitting V x ≈ W (x + δ) + ε. The least-squares solution without a mask
is the target T = W + (W·E[δ xᵀ] + E[ε xᵀ])·E[x xᵀ]⁻¹, which is pruned in place of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import AboveZero, Fraction, check_options
from .curvature import Curvature
from .moments import sums_dtype
from .pieces import TokenPieces
from .products import add_product


class CrossMoments:
    """Accumulates ``δ xᵀ``, or ``W δ xᵀ`` of a single layer, and ``ε xᵀ`` over calibration tokens.

    As in :class:`rose_exp.engine.InputMoments`, the sums on a CPU are bitwise independent of the split into updates.

    Args:
        columns: width of the layer's input.
        width: width of the hidden states that the layer's output is added to; None if there are none.
        weight: W of the only layer with these inputs, (rows, columns). The sums are then those of ``W δ xᵀ``, which is cheaper
            if 2 · rows < columns.
        device: device of the sums; inputs are moved there.
        dtype: dtype of the products, float32 or float64.
    """

    def __init__(
        self,
        columns: int,
        width: int | None = None,
        *,
        weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if columns < 1:
            raise ValueError(f"columns: expected at least 1, got {columns}")
        if weight is not None and (weight.ndim != 2 or weight.shape[1] != columns):
            raise ValueError(f"weight: expected shape (rows, {columns}), got {tuple(weight.shape)}")
        self.columns, self.width, self.dtype = columns, width, dtype
        kept = sums_dtype(device, dtype)
        self._weight = None if weight is None else weight.detach().to(device, dtype)
        rows = columns if weight is None else len(weight)
        self._gram = torch.zeros(rows, columns, device=device, dtype=kept)  # Σ δ xᵀ or Σ W δ xᵀ
        self._residual = None if width is None else torch.zeros(width, columns, device=device, dtype=kept)  # Σ ε xᵀ
        self._pieces = TokenPieces(dtype)
        self.tokens = 0

    @property
    def gram(self) -> Tensor:
        """Σ δ xᵀ, (columns, columns), or Σ W δ xᵀ, (rows, columns), if a weight is given."""
        self._finish_piece()
        return self._gram

    @property
    def residual(self) -> Tensor | None:
        """Σ ε xᵀ, (width, columns); None if the layer's output is not added to hidden states."""
        self._finish_piece()
        return self._residual

    @torch.no_grad()
    def update(self, inputs: Tensor, dense: Tensor, residual: Tensor | None = None) -> None:
        """Add a batch of tokens.

        Args:
            inputs: x, (..., columns).
            dense: x + δ, of the same shape.
            residual: ε, (..., width), the dense minus the pruned hidden states; None leaves the sums of ε unchanged.

        Raises:
            ValueError: if the shapes do not match.
        """
        if inputs.shape != dense.shape or inputs.shape[-1:] != (self.columns,):
            raise ValueError(
                f"dense: expected the shape of inputs, (..., {self.columns}), "
                f"got {tuple(dense.shape)} and {tuple(inputs.shape)}"
            )
        if residual is not None and (self.width is None or residual.shape != (*inputs.shape[:-1], self.width)):
            raise ValueError(f"residual: expected shape {(*inputs.shape[:-1], self.width)}, got {tuple(residual.shape)}")
        device = self._gram.device
        x = inputs.reshape(-1, self.columns).to(device, self.dtype)
        streams = [x, dense.reshape(-1, self.columns).to(x) - x]
        streams += [] if residual is None else [residual.reshape(-1, self.width).to(x)]
        if device.type == "cpu":
            for pieces, _ in self._pieces.push(streams):
                self._add(*pieces)
        else:
            self._add(*streams)
        self.tokens += len(x)

    def _add(self, x: Tensor, change: Tensor, residual: Tensor | None = None) -> None:
        add_product(self._gram, (change if self._weight is None else change @ self._weight.T).T, x)
        if residual is not None:
            add_product(self._residual, residual.T, x)

    @torch.no_grad()
    def _finish_piece(self) -> None:
        for pieces, _ in self._pieces.rest():
            self._add(*pieces)

    def finish(self) -> None:
        """Round the sums to ``dtype``. Call it after the last update."""
        self._finish_piece()
        self._gram = self._gram.to(self.dtype)
        self._residual = None if self._residual is None else self._residual.to(self.dtype)

    def images(self, weights: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
        """Return scale · Σ W δ xᵀ, (rows, columns), of each weight W, in the dtype of the weights.

        Raises:
            ValueError: if the sums are those of another weight.
        """
        if self._weight is None:
            return [weight @ (scale * self.gram.to(weight)) for weight in weights]
        if len(weights) != 1 or weights[0].shape != self.gram.shape:
            got = [tuple(weight.shape) for weight in weights]
            raise ValueError(f"cross_moments: expected a single weight of shape {tuple(self.gram.shape)}, got {got}")
        return [scale * self.gram.to(weights[0])]

    @torch.no_grad()
    def subtract_own_output(self, weight: Tensor) -> None:
        """Subtract W δ from the sums of ε, if the hidden states passed to :meth:`update` included the layer's own output."""
        if self._weight is None:
            self.residual.addmm_(weight.to(self.gram), self.gram, alpha=-1)
        else:
            self.residual.sub_(self.gram)

    def permuted(self, order: Tensor) -> CrossMoments:
        """Return the cross moments of the same inputs with their columns in the given order, (columns,) int64."""
        other = CrossMoments(self.columns, device="meta", dtype=self.dtype)
        other._gram = self.gram[order][:, order] if self._weight is None else self.gram[:, order]
        other._weight = None if self._weight is None else self._weight[:, order]
        other._residual, other.width = None if self.residual is None else self.residual[:, order], self.width
        other.tokens = self.tokens
        return other

    @property
    def sums(self) -> list[Tensor]:
        return [self.gram] if self.residual is None else [self.gram, self.residual]


@dataclass(frozen=True)
class Target:
    """T = W + (s·W·E[δ xᵀ] + r·E[ε xᵀ])·(E[x xᵀ] + λI)⁻¹.

    Args:
        strength: s, from 0 to 1. δ is predicted from x on the calibration data. The prediction has less variance than δ; at
            s = 1 this loss accumulates from block to block until the model breaks down.
        residual: r, from 0 to 1; applies to layers whose output is added to the hidden states.
        damping: λ, as a fraction of the mean of the diagonal of E[x xᵀ].
    """

    strength: Fraction = 0.0
    residual: Fraction = 0.0
    damping: AboveZero = 0.1

    def __post_init__(self):
        check_options(self)

    def __bool__(self) -> bool:
        return self.strength > 0 or self.residual > 0

    def of(self, weights: Sequence[Tensor], curvature: Curvature, cross_moments: CrossMoments) -> list[Tensor]:
        """Return the target T of each weight (rows, columns); all weights share their inputs.

        A target is NaN where the damped E[x xᵀ] is not positive definite.

        Raises:
            ValueError: if the cross moments are those of other weights, or if they include hidden states and there is more
                than one weight.
        """
        if cross_moments.residual is not None and len(weights) != 1:
            raise ValueError(f"cross_moments: expected a single layer if they include hidden states, got {len(weights)}")
        shifted = curvature.hessian.clone()  # 2 E[x xᵀ]
        mean = shifted.diagonal().mean()
        shifted.diagonal().add_(self.damping * torch.where(mean > 0, mean, torch.ones_like(mean)))
        lower, failed = torch.linalg.cholesky_ex(shifted, check_errors=False)
        lower.masked_fill_(failed > 0, torch.nan)  # a failed factor is finite: NaN makes prune_layers reject the target
        share = 2 / max(cross_moments.tokens, 1)
        products = cross_moments.images(weights, self.strength * share)
        if cross_moments.residual is not None:
            products[0] += self.residual * share * cross_moments.residual.to(products[0])
        moves = torch.cholesky_solve(torch.cat(products).T, lower).T.split([len(weight) for weight in weights])
        return [weight + move for weight, move in zip(weights, moves, strict=True)]
