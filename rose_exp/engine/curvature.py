"""Statistics of a layer's inputs, computed once for all layers that share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .hessian import Factor, NotPositiveDefiniteError, factorize
from .moments import InputMoments


@dataclass
class Curvature:
    """Statistics of one set of inputs, in the precision in which the layers are solved.

    Attributes:
        damping: damping of the factor, as a fraction of the mean of H's diagonal.
        hessian_used: whether the Hessian, or what is derived from it other than its diagonal, has been read since this was
            last set to False.
    """

    moments: InputMoments
    damping: float
    dtype: torch.dtype
    hessian_used: bool = False

    @property
    def hessian(self) -> Tensor:
        """H = 2·E[x xᵀ], (columns, columns), not damped."""
        self.hessian_used = True
        return self._hessian

    @cached_property
    def _hessian(self) -> Tensor:
        return self.moments.hessian().to(self.dtype)

    @cached_property
    def norms(self) -> Tensor:
        """sqrt(E[x²]) of each column, (columns,)."""
        return self.moments.mean_square().sqrt().to(self.dtype)

    @cached_property
    def dead(self) -> Tensor:
        """Dead input channels (always zero on the calibration data), (columns,) bool."""
        return self._hessian.diagonal() == 0

    @property
    def factor(self) -> Factor:
        """Factor of the inverse Hessian, columns left to right."""
        self.hessian_used = True
        return self._factor

    @cached_property
    def _factor(self) -> Factor:
        return factorize(self._hessian.clone(), self.damping)

    def normalized(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return D⁻¹(H + λI)D⁻¹, (columns, columns), which has a unit diagonal, and D, (columns,).

        The first is the Hessian of W·D. λ is ``damping`` times the mean of H's diagonal. At a damping of 0, dead columns
        have a row of zeros and a scale of 1.
        """
        diagonal = self.hessian.diagonal()
        scale = (diagonal + damping * diagonal.mean()).sqrt()
        alive = scale > 0
        scale = torch.where(alive, scale, torch.ones_like(scale))
        scaled = self.hessian / scale / scale[:, None]
        scaled.diagonal().copy_(alive.to(scaled))
        return scaled, scale

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (columns,) and eigenvectors (columns, columns), float64, of the Hessian of
        :meth:`normalized` at this damping.

        Raises:
            NotPositiveDefiniteError: if the eigenvalue solver fails.
        """
        try:
            values, vectors = torch.linalg.eigh(self.normalized(self.damping)[0].double())
        except torch.linalg.LinAlgError as error:
            raise NotPositiveDefiniteError(
                f"the Hessian of {self.moments.columns} columns has no eigenvalues: {error}"
            ) from error
        return values, vectors

    def penalised_inverse(self, penalty: float) -> Tensor:
        """Return (H + ρI)⁻¹ for the Hessian of :attr:`spectrum`, (columns, columns); not cached."""
        self.hessian_used = True
        values, vectors = self.spectrum
        return ((vectors / (values + penalty)) @ vectors.T).to(self.dtype)

    def factor_in(self, order: Tensor) -> Factor:
        """Return the factor of the inverse Hessian with columns in the given order, (columns,) int64; not cached."""
        return factorize(self.hessian.index_select(0, order).index_select(1, order), self.damping)
