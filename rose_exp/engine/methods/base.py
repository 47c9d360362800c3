"""What a pruning method is given and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..hessian import Factor, factorise
from ..kernels import Backend
from ..moments import InputMoments
from ..ordering import ColumnOrder, ExpectedLosses, Ordering, Score, arrange, expected_losses
from ..patterns import Sparsity


@dataclass
class Layer:
    """One layer to prune, in the precision that it is solved in.

    Attributes:
        weight: W, (rows, columns).
        moments: of the layer's inputs.
    """

    weight: Tensor
    moments: InputMoments
    sparsity: Sparsity
    ordering: Ordering | None
    block_size: int
    damping: float
    backend: Backend = "auto"
    _losses: dict[Score, ExpectedLosses] = field(default_factory=dict, repr=False)

    @cached_property
    def hessian(self) -> Tensor:
        """H = 2·E[x xᵀ], (columns, columns), not damped."""
        return self.moments.hessian().to(self.weight)

    @cached_property
    def norms(self) -> Tensor:
        """sqrt(E[x²]) of each column, (columns,)."""
        return self.moments.mean_square().sqrt().to(self.weight)

    @cached_property
    def dead(self) -> Tensor:
        """Columns whose input never fired, (columns,) bool."""
        return self.hessian.diagonal() == 0

    @cached_property
    def factor(self) -> Factor:
        """Of the inverse Hessian, columns left to right."""
        return factorise(self.hessian, self.damping)

    def scores(self, kind: Score) -> Tensor:
        """What each weight is expected to cost, (rows, columns); see :class:`Ordering`."""
        if kind == "wanda":
            return self.weight.abs() * self.norms
        if kind == "magnitude":
            return self.weight.abs()
        return (self.weight.square() / self.factor.inverse_diagonal()).masked_fill(self.dead, 0)

    def losses(self, kind: Score = "wanda") -> ExpectedLosses:
        if kind not in self._losses:
            self._losses[kind] = expected_losses(self.scores(kind), self.sparsity, self.block_size)
        return self._losses[kind]

    def column_order(self) -> ColumnOrder:
        return arrange(self.ordering, self.losses(self.ordering.score if self.ordering else "wanda"))


@dataclass(frozen=True)
class Solution:
    """What a method answers.

    Attributes:
        weight: V, (rows, columns), zero where pruned.
        mask: bool, (rows, columns), True where pruned.
        order: the order in which columns were pruned; None for methods that prune all at once.
        damping: really used, as a share of the mean of H's diagonal; 0 where no Hessian is inverted.
    """

    weight: Tensor
    mask: Tensor
    order: ColumnOrder | None = None
    damping: float = 0.0


class Method(ABC):
    """A pruning method. Subclasses are frozen dataclasses whose fields are the method's options."""

    sequential: bool = False
    """Whether the method prunes column by column, so that an ordering changes what comes out."""

    @abstractmethod
    def prune(self, layer: Layer) -> Solution: ...


def drop(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` with zeros where ``mask`` is True, a new tensor."""
    return torch.where(mask, torch.zeros_like(weight), weight)
