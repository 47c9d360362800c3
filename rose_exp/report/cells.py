"""Cells of a table: values by seed, their spread and the paired difference to a baseline."""

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
    """Mean difference to a baseline, paired by seed.

    Attributes:
        relative: the mean as a fraction of the baseline's mean.
        pairs: number of seeds.
        low, high: 95 % confidence interval (Student's t over the pairs); None for a single pair.
    """

    mean: float
    relative: float
    pairs: int
    low: float | None = None
    high: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the confidence interval excludes 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


@dataclass
class Cell:
    """Runs that differ only in their seed.

    Attributes:
        values: values by seed.
        draws: fingerprints of the calibration data by seed; None for a dense model.
        runs: run records by seed.
        best: whether the mean is the best of its column.
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
        """Standard deviation over the seeds; None for a single seed or if a value is not finite."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 and self.finite else None


def paired_difference(cell: Cell, baseline: Cell) -> Difference | None:
    """Return the difference over the seeds for which both cells have the same calibration data; None without such seeds."""
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
    """Mark the best mean in a column of pruned models, if at least two are finite."""
    means = {name: cell.mean for name, cell in cells.items() if math.isfinite(cell.mean)}
    if len(means) > 1:
        best = min(means.values()) if lower else max(means.values())
        for name, mean in means.items():
            cells[name].best = mean == best
