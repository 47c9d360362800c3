"""What pruning needs to know of a layer's inputs, worked out once for all layers that share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .hessian import Factor, NotPositiveDefiniteError, factorise
from .moments import InputMoments


@dataclass
class Curvature:
    """Statistics of one set of inputs, in the precision that the layers are solved in.

    Attributes:
        damping: of the factor, as a share of the mean of H's diagonal.
    """

    moments: InputMoments
    damping: float
    dtype: torch.dtype

    @cached_property
    def hessian(self) -> Tensor:
        """H = 2·E[x xᵀ], (columns, columns), not damped."""
        return self.moments.hessian().to(self.dtype)

    @cached_property
    def norms(self) -> Tensor:
        """sqrt(E[x²]) of each column, (columns,)."""
        return self.moments.mean_square().sqrt().to(self.dtype)

    @cached_property
    def dead(self) -> Tensor:
        """Columns whose input never fired, (columns,) bool."""
        return self.hessian.diagonal() == 0

    @cached_property
    def factor(self) -> Factor:
        """Of the inverse Hessian, columns left to right."""
        return factorise(self.hessian.clone(), self.damping)

    def normalised(self, damping: float) -> tuple[Tensor, Tensor]:
        """D⁻¹(H + λI)D⁻¹, (columns, columns), whose diagonal is 1, and D, (columns,): the Hessian of W·D. λ is ``damping``
        times the mean of H's diagonal; a column that never fired at a damping of 0 has a row of zeros, and a scale of 1."""
        diagonal = self.hessian.diagonal()
        scale = (diagonal + damping * diagonal.mean()).sqrt()
        alive = scale > 0
        scale = torch.where(alive, scale, torch.ones_like(scale))
        scaled = self.hessian / scale / scale[:, None]
        scaled.diagonal().copy_(alive.to(scaled))
        return scaled, scale

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (columns,) and eigenvectors (columns, columns), float64, of the damped Hessian that :meth:`normalised`
        makes of this damping.

        Raises:
            NotPositiveDefiniteError: they cannot be found.
        """
        try:
            values, vectors = torch.linalg.eigh(self.normalised(self.damping)[0].double())
        except torch.linalg.LinAlgError as error:
            raise NotPositiveDefiniteError(
                f"the Hessian of {self.moments.columns} columns has no eigenvalues: {error}"
            ) from error
        return values, vectors

    def penalised_inverse(self, penalty: float) -> Tensor:
        """(H + ρI)⁻¹ of that Hessian, (columns, columns); not kept."""
        values, vectors = self.spectrum
        return ((vectors / (values + penalty)) @ vectors.T).to(self.dtype)

    def factor_in(self, order: Tensor) -> Factor:
        """Of the inverse Hessian, columns in another order (columns,) int64; not kept."""
        return factorise(self.hessian.index_select(0, order).index_select(1, order), self.damping)
