"""What pruning needs to know of a layer's inputs, worked out once for all layers that share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .hessian import Factor, factorise
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

    def factor_in(self, order: Tensor) -> Factor:
        """Of the inverse Hessian, columns in another order (columns,) int64; not kept."""
        return factorise(self.hessian.index_select(0, order).index_select(1, order), self.damping)
