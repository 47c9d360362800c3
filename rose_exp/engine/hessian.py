"""Factorising the Hessian: damping, dead columns, and what happens when it is not positive definite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING_TRIES = 5  # the damping asked for, then four times ten times more
LEAST_RAISED_DAMPING = 1e-4  # what a damping of 0 is raised to first

SMALL_TRIANGLE = 128  # columns below which a triangular inverse is left to one solve


class NotPositiveDefiniteError(ArithmeticError):
    """The Hessian could not be factorised at any damping tried."""


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor U of the inverse of the damped Hessian: (H + λI)⁻¹ = Uᵀ U.

    Attributes:
        upper: (columns, columns), upper triangular.
        damping: the damping really used, as a share of the mean of H's diagonal.
    """

    upper: Tensor
    damping: float

    def inverse_diagonal(self) -> Tensor:
        """[H⁻¹]ⱼⱼ of each column, (columns,)."""
        return self.upper.square().sum(dim=0)


def factorise(hessian: Tensor, damping: float) -> Factor:
    """Damp and factorise ``hessian`` (columns, columns), which is left as it is.

    λ = damping · mean(diag H), as in SparseGPT. A column that never fired (diagonal 0) gets the mean of the diagonal,
    so that it is independent of all others. Where Cholesky fails, the damping is raised by tens, :data:`DAMPING_TRIES`
    dampings in all.

    The factor comes from one Cholesky and one triangular inverse: with the columns in reverse order H' = L Lᵀ, so
    H = R Rᵀ with R = reverse(L) upper triangular, and U = R⁻¹.

    Raises:
        NotPositiveDefiniteError: no damping tried was enough.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    scale = torch.where(mean > 0, mean, torch.ones_like(mean))
    filled = torch.where(diagonal == 0, scale, diagonal)
    for tried in _dampings(damping):
        damped = hessian.clone()
        damped.diagonal().copy_(filled + tried * scale)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return Factor(invert_upper(lower.flip(0, 1)), tried)
    raise NotPositiveDefiniteError(
        f"the Hessian of {len(hessian)} columns is not positive definite at damping "
        f"{', '.join(f'{d:g}' for d in _dampings(damping))}: the calibration inputs hold values too large or too small for "
        f"{str(hessian.dtype).removeprefix('torch.')}"
    )


def invert_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix (n, n), by halves: nearly all of the work is in large matrix products, which a
    triangular solve against the identity is not."""
    n = len(upper)
    if n <= SMALL_TRIANGLE:
        identity = torch.eye(n, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    half = n // 2
    inverse = torch.zeros_like(upper)
    first, last = invert_upper(upper[:half, :half]), invert_upper(upper[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    torch.mm(first @ upper[:half, half:], last.neg(), out=inverse[:half, half:])
    return inverse


def _dampings(first: float) -> list[float]:
    raised = first * 10 or LEAST_RAISED_DAMPING
    return [first, *(raised * 10**i for i in range(DAMPING_TRIES - 1))]
