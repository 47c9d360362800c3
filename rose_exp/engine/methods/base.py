"""Interface of the pruning methods: their input, their result and their base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bounds import check_options
from ..curvature import Curvature
from ..footprint import Working
from ..hessian import Factor
from ..kernels.backends import Backend
from ..moments import InputMoments
from ..ordering import ColumnOrder, ExpectedLosses, Ordering, arrange, expected_losses
from ..patterns import Sparsity
from ..scores import SCORES


@dataclass
class Layer:
    """One layer to prune, in the precision in which it is solved.

    Attributes:
        weight: W, (rows, columns).
        curvature: statistics of the layer's inputs, shared by layers with the same inputs.
        reordered: whether the columns are reordered; None if not known yet, see :func:`resolve_orders`.
        given: pruning order to use instead of the one computed from the ordering.
        shift: binary exponent of the factor applied to ``weight`` to keep its outputs within the range of the precision; 0
            unless they are far from 1. An absolute threshold on outputs must be multiplied by ``2 ** shift``.
    """

    weight: Tensor
    curvature: Curvature
    sparsity: Sparsity
    ordering: Ordering | None
    block_size: int
    backend: Backend = "auto"
    reordered: bool | None = None
    given: ColumnOrder | None = None
    shift: int = 0
    _losses: dict[str, ExpectedLosses] = field(default_factory=dict, repr=False)

    @property
    def moments(self) -> InputMoments:
        return self.curvature.moments

    @property
    def dead(self) -> Tensor:
        """Dead input channels (always zero on the calibration data), (columns,) bool."""
        return self.curvature.dead

    @property
    def factor(self) -> Factor:
        """Factor of the inverse Hessian, columns left to right."""
        return self.curvature.factor

    @cached_property
    def transposed(self) -> Tensor:
        """Wᵀ, (columns, rows), contiguous, so that a column of the layer is a row of memory."""
        return self.weight.T.contiguous()

    def scores(self, kind: Literal["wanda", "magnitude"]) -> Tensor:
        """Return the expected loss of each weight, (rows, columns); see :class:`Ordering`."""
        return self.weight.abs().mul_(self.curvature.norms) if kind == "wanda" else self.weight.abs()

    def losses(self, kind: str = "wanda") -> ExpectedLosses:
        if kind not in self._losses:
            self._losses[kind] = expected_losses(SCORES[kind](self), self.sparsity, self.block_size)
        return self._losses[kind]

    @cached_property
    def order(self) -> ColumnOrder:
        return self.given or arrange(self.ordering, self.losses(self.ordering.score if self.ordering else "wanda"))


def resolve_orders(layers: Sequence[Layer]) -> None:
    """Set ``reordered`` of each layer, with one device synchronization for all of them."""
    if not layers[0].ordering:
        flags = [False] * len(layers)
    else:
        flags = torch.stack([layer.order.reordered for layer in layers]).tolist()
    for layer, flag in zip(layers, flags, strict=True):
        layer.reordered = flag


@dataclass(frozen=True)
class Solution:
    """Result of a pruning method.

    Attributes:
        weight: V, (rows, columns), zero where pruned.
        mask: bool, (rows, columns), True where pruned.
        factor: factor of the inverse Hessian, if the method uses one.
        lost: tr((W−V) H (W−V)ᵀ) if the method computes it, a scalar tensor.
        costs: squared error of each update of a sweep, see :func:`rose_exp.engine.sweep.sweep`.
        damped: whether the method uses a damped Hessian without a ``factor``.
        rank: rank of a matrix added to the pruned one, which makes ``weight`` dense; 0 if there is none.
    """

    weight: Tensor
    mask: Tensor
    factor: Factor | None = None
    lost: Tensor | None = None
    costs: Tensor | None = None
    rank: int = 0
    damped: bool = False


class Method(ABC):
    """Base class of the pruning methods.

    Subclasses are frozen dataclasses named as in the literature; their fields are the method's options.
    """

    sequential: ClassVar[bool] = False
    """Whether the method prunes column by column, so that an ordering changes the result."""
    sparse: ClassVar[bool] = True
    """Whether the result is zero where pruned, as refinement requires."""
    retained: ClassVar[Working] = Working()
    """Memory of a solved layer besides its weight and mask, which is freed once all layers with the same inputs are solved."""

    def __post_init__(self):
        check_options(self)

    def working(self, sparsity: Sparsity) -> tuple[Working, ...]:
        """Return the peak memory of solving a layer besides its weight and moments, in one or more phases.

        Measured on a CPU; the default is the largest value of the methods here.
        """
        return (Working(squares=2, kept=2.25, largest=11),)

    def concern(self, columns: int, sparsity: Sparsity) -> str | None:
        """Return why the method is unlikely to work well on a layer with ``columns`` inputs; None if there is no reason."""
        return None

    @abstractmethod
    def prune(self, layer: Layer) -> Solution: ...


def drop(weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``weight`` with zeros where ``mask`` is True, as a new tensor."""
    return weight.masked_fill(mask, 0)
