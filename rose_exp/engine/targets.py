"""What a layer is asked to be: not W, but what brings the pruned model back to the dense one.

In a model that is pruned from its first block on a layer is fed with x, where the dense model feeds it with x + δ. Asymmetric
calibration, as in GPTAQ (Li et al., 2025), asks for V x ≈ W (x + δ). A layer whose output is added to the hidden states can do
more: these have drifted, too, from h + ε to h, and V x ≈ W (x + δ) + ε brings them back. Without a mask the least squares
solution is T = W + (W·E[δ xᵀ] + E[ε xᵀ])·E[x xᵀ]⁻¹, and it is T that is pruned in place of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .curvature import Curvature
from .moments import sums_dtype
from .pieces import TokenPieces
from .products import add_product


class Drift:
    """Sums over calibration tokens of ``δ xᵀ`` and ``ε xᵀ``.

    They are summed in the way of :class:`rose_exp.engine.InputMoments`: on a CPU the split into updates changes no bit.

    Args:
        columns: width of the layer's input.
        width: of the hidden states that the layer's output is added to; None: it is not added to any.
        device: where the sums are kept; inputs are moved there.
        dtype: float32 or float64, of the products.
    """

    def __init__(
        self,
        columns: int,
        width: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if columns < 1:
            raise ValueError(f"columns: expected at least 1, got {columns}")
        self.columns, self.width, self.dtype = columns, width, dtype
        kept = sums_dtype(device, dtype)
        self._gram = torch.zeros(columns, columns, device=device, dtype=kept)  # Σ δ xᵀ
        self._residual = None if width is None else torch.zeros(width, columns, device=device, dtype=kept)  # Σ ε xᵀ
        self._pieces = TokenPieces(dtype)
        self.tokens = 0

    @property
    def gram(self) -> Tensor:
        """Σ δ xᵀ, (columns, columns)."""
        self._finish_piece()
        return self._gram

    @property
    def residual(self) -> Tensor | None:
        """Σ ε xᵀ, (width, columns); None where the layer's output is not added to hidden states."""
        self._finish_piece()
        return self._residual

    @torch.no_grad()
    def update(self, inputs: Tensor, dense: Tensor, missing: Tensor | None = None) -> None:
        """Add some tokens.

        Args:
            inputs: x, (..., columns).
            dense: x + δ, of the same shape.
            missing: ε, (..., width): what the hidden states lack; None: nothing is added to those sums.

        Raises:
            ValueError: shapes that do not fit.
        """
        if inputs.shape != dense.shape or inputs.shape[-1:] != (self.columns,):
            raise ValueError(
                f"dense: expected the shape of inputs, (..., {self.columns}), "
                f"got {tuple(dense.shape)} and {tuple(inputs.shape)}"
            )
        if missing is not None and (self.width is None or missing.shape != (*inputs.shape[:-1], self.width)):
            raise ValueError(f"missing: expected shape {(*inputs.shape[:-1], self.width)}, got {tuple(missing.shape)}")
        device = self._gram.device
        x = inputs.reshape(-1, self.columns).to(device, self.dtype)
        streams = [x, dense.reshape(-1, self.columns).to(x) - x]
        streams += [] if missing is None else [missing.reshape(-1, self.width).to(x)]
        if device.type == "cpu":
            for pieces, _ in self._pieces.push(streams):
                self._add(*pieces)
        else:
            self._add(*streams)
        self.tokens += len(x)

    def _add(self, x: Tensor, change: Tensor, missing: Tensor | None = None) -> None:
        add_product(self._gram, change.T, x)
        if missing is not None:
            add_product(self._residual, missing.T, x)

    @torch.no_grad()
    def _finish_piece(self) -> None:
        for pieces, _ in self._pieces.rest():
            self._add(*pieces)

    def finish(self) -> None:
        """Round the sums to ``dtype``. No update may follow."""
        self._finish_piece()
        self._gram = self._gram.to(self.dtype)
        self._residual = None if self._residual is None else self._residual.to(self.dtype)

    @torch.no_grad()
    def leave_out(self, weight: Tensor) -> None:
        """Take W δ out of ``missing``, where the hidden states already contained the layer's own output: those lack W δ
        beside ε."""
        self.residual.addmm_(weight.to(self.gram), self.gram, alpha=-1)

    def permuted(self, order: Tensor) -> Drift:
        """That of the same inputs with their columns in another order (columns,) int64; a new object."""
        other = Drift(self.columns, device="meta", dtype=self.dtype)
        other._gram = self.gram[order][:, order]
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
        strength: s, from 0 to 1. What x says of δ is known from the calibration text alone, and a layer that answers with what
            is expected answers with too little variance: at s = 1 that adds up from block to block until the model comes apart.
        residual: r, from 0 to 1; of layers whose output is added to the hidden states.
        damping: λ, as a share of the mean of the diagonal of E[x xᵀ].
    """

    strength: float = 0.5
    residual: float = 0.5
    damping: float = 0.1

    def __post_init__(self):
        for name in ("strength", "residual"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping: expected a finite number above 0, got {self.damping}")

    def __bool__(self) -> bool:
        return self.strength > 0 or self.residual > 0

    def of(self, weights: Sequence[Tensor], curvature: Curvature, drift: Drift) -> list[Tensor]:
        """T of each of the ``weights`` (rows, columns) that share their inputs.

        Raises:
            ValueError: several weights, of which the drift cannot say which are added to the hidden states.
        """
        if drift.residual is not None and len(weights) != 1:
            raise ValueError(f"drift: expected one layer where hidden states are part of it, got {len(weights)}")
        shifted = curvature.hessian.clone()  # 2 E[x xᵀ]
        mean = shifted.diagonal().mean()
        shifted.diagonal().add_(self.damping * torch.where(mean > 0, mean, torch.ones_like(mean)))
        lower, failed = torch.linalg.cholesky_ex(shifted, check_errors=False)
        lower.masked_fill_(failed > 0, torch.nan)  # a failed factor is finite: NaN makes prune_layers reject the target
        share = 2 / max(drift.tokens, 1)
        wanted = [weight @ (self.strength * share * drift.gram.to(weight)) for weight in weights]
        if drift.residual is not None:
            wanted[0] += self.residual * share * drift.residual.to(wanted[0])
        moves = torch.cholesky_solve(torch.cat(wanted).T, lower).T.split([len(weight) for weight in weights])
        return [weight + move for weight, move in zip(weights, moves, strict=True)]
