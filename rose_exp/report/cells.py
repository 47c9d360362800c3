"""What is known of one method at one setting: its values by seed, their spread, and how far it is from another method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from .published import Published

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of the differences to a baseline, seed by seed; ``low`` and ``high`` bound it with 95 % confidence (Student's t, on
    the pairs), where there are two seeds or more."""

    mean: float
    relative: float  # of the baseline's mean
    pairs: int
    low: float | None = None
    high: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


@dataclass
class Cell:
    """Runs that differ in nothing but their seed.

    Attributes:
        values: by seed.
        draws: fingerprint of the calibration windows by seed; None for a dense model.
        runs: records by seed.
    """

    values: dict[int, float] = field(default_factory=dict)
    draws: dict[int, str | None] = field(default_factory=dict)
    runs: dict[int, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    difference: Difference | None = None
    published: Published | None = None
    best: bool = False

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.values.values()))

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of a single one, and where a value is not finite."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 and self.finite else None


def paired_difference(cell: Cell, baseline: Cell) -> Difference | None:
    """Of the seeds that both have, where both have drawn the same calibration windows."""
    seeds = [s for s in cell.values if s in baseline.values and cell.draws[s] == baseline.draws[s]]
    if not seeds or not (cell.finite and baseline.finite):
        return None
    differences = [cell.values[seed] - baseline.values[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    relative = mean / statistics.fmean(baseline.values[seed] for seed in seeds)
    if len(seeds) == 1:
        return Difference(mean, relative, 1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1) * statistics.stdev(differences) / math.sqrt(len(seeds))
    return Difference(mean, relative, len(seeds), mean - half, mean + half)


def mark_best(cells: Mapping[str, Cell], lower: bool) -> None:
    """Mark the best mean of the pruned models in a column; none where there is nothing to choose from."""
    means = {name: cell.mean for name, cell in cells.items() if math.isfinite(cell.mean)}
    if len(means) > 1:
        best = min(means.values()) if lower else max(means.values())
        for name, mean in means.items():
            cells[name].best = mean == best
