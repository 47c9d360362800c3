"""Peak memory of solving layers on a CPU, in bytes.

Solving passes through phases, such as the regression target, the method, the refinement and the statistics of the result. The
peak is that of the largest phase. Each phase holds matrices of three sizes, which :class:`Working` counts. The counts are
measured: ``tests/engine/test_footprint.py`` compares them with the allocations of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .methods import Method
    from .patterns import Sparsity

ITEM = 4  # bytes of a float32


@dataclass(frozen=True)
class Working:
    """Memory of a phase in float32 matrices.

    Attributes:
        squares: matrices of (columns, columns).
        kept: matrices of (rows, columns) for all layers that are solved together.
        largest: further matrices of (rows, columns) for the largest of these layers.
        smaller: matrices of the smaller of rows and columns of that layer, squared.
    """

    squares: float = 0.0
    kept: float = 0.0
    largest: float = 0.0
    smaller: float = 0.0

    def __add__(self, other: Working) -> Working:
        return Working(*(mine + yours for mine, yours in zip(self.counts, other.counts, strict=True)))

    @property
    def counts(self) -> tuple[float, float, float, float]:
        return self.squares, self.kept, self.largest, self.smaller

    def bytes(self, columns: int, rows: Sequence[int]) -> int:
        """Return the memory of layers of the given rows, which share inputs of ``columns`` columns."""
        most = max(rows)
        sizes = (columns**2, sum(rows) * columns, most * columns, min(most, columns) ** 2)
        return int(ITEM * sum(count * size for count, size in zip(self.counts, sizes, strict=True)))


TARGET = Working(squares=4, kept=3)
FINISH = Working(squares=1, kept=2.25, largest=1)
CONJUGATE_GRADIENT = Working(squares=2, kept=10.75)
ADMM = (Working(squares=2, kept=12), Working(squares=5, kept=8.75))
GOALS = Working(kept=1)  # regression targets
CONVERTED = Working(kept=1)  # weights of half precision in float32
ROUNDED = Working(kept=2.5)  # results in both precisions
TRANSPOSED = Working(kept=1)  # for the losses of the columns
LOSSES = Working(largest=0.5)


@dataclass(frozen=True)
class Problem:
    """What the memory of solving depends on, besides the sizes of the layers.

    Attributes:
        half: whether the weights have half precision.
        ordered: whether the columns may be reordered.
        conjugate_gradient, admm: whether layers are refined, and whether refinement selects a new mask.
        target: whether there is a regression target.
    """

    method: Method
    sparsity: Sparsity
    half: bool = False
    ordered: bool = False
    conjugate_gradient: bool = False
    admm: bool = False
    target: bool = False

    def peak(self, columns: int, rows: Sequence[int]) -> int:
        """Return the peak memory of solving layers of the given rows together, besides their weights and moments."""
        return max(phase.bytes(columns, rows) for phase in self._phases(len(rows)))

    def _phases(self, layers: int) -> Iterator[Working]:
        method = self.method
        always = (GOALS if self.target else Working()) + (CONVERTED if self.half else Working())
        if self.ordered and not method.sequential:
            always += TRANSPOSED
        if self.target:
            yield TARGET + (CONVERTED if self.half else Working())
        retained = method.retained
        for phase in method.working(self.sparsity):
            yield phase + always
        if self.ordered and method.sequential:  # every layer has a factor in its own order
            retained = replace(retained, squares=retained.squares + layers - 1)
            yield Working(squares=1 + layers, kept=2.25, largest=2) + always
            yield Working(squares=2 + layers, kept=2.25) + always
        rounded = (GOALS if self.target else Working()) + (ROUNDED if self.half else Working())
        if self.ordered:
            rounded += LOSSES
        yield FINISH + Working(retained.squares, 0, retained.largest) + rounded
        if self.admm or self.conjugate_gradient:
            for phase in ADMM if self.admm else (CONJUGATE_GRADIENT,):
                yield phase + retained + always


def groups_peak(method: str, ratio: float, columns: int, rows: int) -> int:
    """Return the peak memory of structured pruning of one layer, besides its weight and moments."""
    if method != "sparsegpt":
        return Working(2, 10).bytes(columns, [rows])
    kept = (1 - ratio) ** 2  # of the inverse Hessian
    phases = (Working(11, 2), Working(6, 10), Working(6 + 4 * kept, 8.9 + 3.6 * kept))
    return max(phase.bytes(columns, [rows]) for phase in phases)
