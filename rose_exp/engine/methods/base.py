"""What a pruning method is given and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..curvature import Curvature
from ..hessian import Factor
from ..kernels.backends import Backend
from ..moments import InputMoments
from ..ordering import ColumnOrder, ExpectedLosses, Ordering, arrange, expected_losses
from ..patterns import Sparsity
from ..scores import SCORES


@dataclass
class Layer:
    """One layer to prune, in the precision that it is solved in.

    Attributes:
        weight: W, (rows, columns).
        curvature: of the layer's inputs; layers with the same inputs share it.
        moved: whether the columns are pruned in an order other than left to right; None: not known yet, see :func:`settle`.
        given: the order to prune in, instead of the one that the ordering finds.
        shift: power of two that ``weight`` has been multiplied by, to keep its outputs inside the range of the precision; 0
            unless they are far from 1. An absolute threshold on outputs must be multiplied by ``2 ** shift``.
    """

    weight: Tensor
    curvature: Curvature
    sparsity: Sparsity
    ordering: Ordering | None
    block_size: int
    backend: Backend = "auto"
    moved: bool | None = None
    given: ColumnOrder | None = None
    shift: int = 0
    _losses: dict[str, ExpectedLosses] = field(default_factory=dict, repr=False)

    @property
    def moments(self) -> InputMoments:
        return self.curvature.moments

    @property
    def dead(self) -> Tensor:
        """Columns whose input never fired, (columns,) bool."""
        return self.curvature.dead

    @property
    def factor(self) -> Factor:
        """Of the inverse Hessian, columns left to right."""
        return self.curvature.factor

    @cached_property
    def transposed(self) -> Tensor:
        """Wᵀ, (columns, rows), contiguous, so that a column of the layer is a row of memory."""
        return self.weight.T.contiguous()

    def scores(self, kind: Literal["wanda", "magnitude"]) -> Tensor:
        """What each weight is expected to cost, (rows, columns); see :class:`Ordering`."""
        return self.weight.abs().mul_(self.curvature.norms) if kind == "wanda" else self.weight.abs()

    def losses(self, kind: str = "wanda") -> ExpectedLosses:
        if kind not in self._losses:
            self._losses[kind] = expected_losses(SCORES[kind](self), self.sparsity, self.block_size)
        return self._losses[kind]

    @cached_property
    def order(self) -> ColumnOrder:
        return self.given or arrange(self.ordering, self.losses(self.ordering.score if self.ordering else "wanda"))


def settle(layers: Sequence[Layer]) -> None:
    """Look at which layers are reordered: on a device one wait for all of them."""
    if layers[0].ordering is None:
        flags = [False] * len(layers)
    else:
        flags = torch.stack([layer.order.reordered for layer in layers]).tolist()
    for layer, flag in zip(layers, flags, strict=True):
        layer.moved = flag


@dataclass(frozen=True)
class Solution:
    """What a method answers.

    Attributes:
        weight: V, (rows, columns), zero where pruned.
        mask: bool, (rows, columns), True where pruned.
        factor: of the Hessian, where the method has inverted it.
        lost: tr((W−V) H (W−V)ᵀ) where the method knows it, a tensor of no dimensions.
        costs: what each update of a sweep has cost, see :func:`rose_exp.engine.sweep.sweep`.
        damped: whether the Hessian was damped in another way than in ``factor``.
        rank: of a matrix that has been added to the pruned one, so that ``weight`` is zero nowhere; 0: none.
    """

    weight: Tensor
    mask: Tensor
    factor: Factor | None = None
    lost: Tensor | None = None
    costs: Tensor | None = None
    rank: int = 0
    damped: bool = False


class Method(ABC):
    """A pruning method. Subclasses are frozen dataclasses, called as the literature calls the method, whose fields are the
    method's options."""

    sequential: ClassVar[bool] = False
    """Whether the method prunes column by column, so that an ordering changes what comes out."""
    sparse: ClassVar[bool] = True
    """Whether what comes out is zero where it is pruned, so that it can be refined."""
    working: ClassVar[tuple[float, float]] = (3.0, 15.0)
    """The most memory that solving takes beside the moments, in float32 matrices of (columns, columns) and of (rows, columns):
    measured on a CPU; what is not measured has the largest of those that are."""

    @abstractmethod
    def prune(self, layer: Layer) -> Solution: ...


def drop(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` with zeros where ``mask`` is True, a new tensor."""
    return weight.masked_fill(mask, 0)
