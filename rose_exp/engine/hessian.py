"""Damping and factorization of the Hessian, with dead columns and failed factorizations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .products import times_lower, times_upper, upper_blocks, upper_times

DAMPING_TRIES = 5  # the requested damping, then four tenfold increases
LEAST_RAISED_DAMPING = 1e-4  # first retry after a damping of 0

CHOLESKY = {"cpu": 600, "cuda": 512}  # up to this many columns, LAPACK or its GPU counterpart computes the factor
SOLVE = 192  # up to this many columns, one triangular solve computes the inverse


class NotPositiveDefiniteError(ArithmeticError):
    """Raised if the Hessian cannot be factorized at any damping tried."""


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor U of the inverse of the damped Hessian: (H + λI)⁻¹ = Uᵀ U.

    Attributes:
        upper: (columns, columns), upper triangular; meaningless if ``failed``.
        shift: λ, a scalar tensor.
        failed: above 0 if the damped Hessian is not positive definite, a scalar int tensor. Reading it synchronizes the
            device.
    """

    upper: Tensor
    shift: Tensor
    failed: Tensor

    def inverse_diagonal(self) -> Tensor:
        """[H⁻¹]ⱼⱼ of each column, (columns,)."""
        return self.upper.square().sum(dim=0)


def dampings(first: float) -> list[float]:
    """Return the dampings to try in turn, as fractions of the mean of H's diagonal: ``first``, then tenfold increases."""
    raised = first * 10 or LEAST_RAISED_DAMPING
    return [first, *(raised * 10**i for i in range(DAMPING_TRIES - 1))]


def factorize(hessian: Tensor, damping: float) -> Factor:
    """Damp and factorize ``hessian`` (columns, columns), in place, without synchronizing the device.

    λ = damping · mean(diag H), as in SparseGPT. A dead column (diagonal 0) gets the mean of the diagonal, which
    keeps it independent of all others.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    scale = torch.where(mean > 0, mean, torch.ones_like(mean))
    shift = damping * scale
    diagonal.copy_(torch.where(diagonal == 0, scale, diagonal) + shift)
    failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
    _invert_factor(hessian, failed)
    return Factor(hessian, shift, failed)


def _invert_factor(h: Tensor, failed: Tensor) -> None:
    """Overwrite a symmetric h with R⁻¹, where h = R Rᵀ and R is upper triangular; only the upper half of h is read.

    Recursion by halves:
    R₂₂ from h₂₂; R₁₂ = h₁₂ R₂₂⁻ᵀ; R₁₁ from h₁₁ − R₁₂ R₁₂ᵀ; and above the diagonal of the inverse −R₁₁⁻¹ R₁₂ R₂₂⁻¹.
    Large products do nearly all the work; they are far faster than a library's Cholesky and triangular solves.
    """
    n = len(h)
    if n <= CHOLESKY.get(h.device.type, 256):
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1), check_errors=False)  # reversed columns give R reversed
        failed += info.abs()
        h.copy_(lower.flip(0, 1))
        _invert_upper(h)
        return
    half = n // 2
    h11, h12, h22 = h[:half, :half], h[:half, half:], h[half:, half:]
    _invert_factor(h22, failed)
    times_lower(h12, h22)  # R₁₂
    for rows, columns in upper_blocks(half, h.device):
        h11[rows, columns].addmm_(h12[rows], h12[columns].T, alpha=-1)
    _invert_factor(h11, failed)
    _join(h, half)


def _invert_upper(r: Tensor) -> None:
    """Overwrite an upper triangular matrix with its inverse."""
    n = len(r)
    if n <= SOLVE:
        r.copy_(torch.linalg.solve_triangular(r, torch.eye(n, dtype=r.dtype, device=r.device), upper=True))
        return
    half = n // 2
    _invert_upper(r[:half, :half])
    _invert_upper(r[half:, half:])
    _join(r, half)


def _join(r: Tensor, half: int) -> None:
    """Complete an inverse whose diagonal blocks are already inverted and whose upper right block still holds R₁₂."""
    r12 = r[:half, half:]
    times_upper(r12, r[half:, half:])
    upper_times(r[:half, :half], r12)
    r12.neg_()
    r[half:, :half] = 0
