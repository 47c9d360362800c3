"""Cells of a table: values by seed and replicate, their spread and the paired difference to a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from scipy import stats

from .published import Published

CONFIDENCE = 0.95
POWER = 0.8
SMALL_EFFECT = 0.02  # below it, the test has so many pairs that Student's t equals the normal distribution


class Repeat(NamedTuple):
    """What distinguishes the runs of a cell: the seed, and the replicate of a seed."""

    seed: int
    replicate: int = 0


Unit = Literal["seed", "replicate"]
"""What a statistic averages over: the seeds, or the replicates if there is a single seed."""


@dataclass(frozen=True)
class Difference:
    """Mean difference to a baseline over pairs of equal seeds. The replicates of a seed are averaged.

    Attributes:
        relative: the mean as a fraction of the baseline's mean; NaN if that is 0.
        pairs: number of seeds; for a single seed, number of replicates.
        unit: unit of a pair.
        low, high: 95 % confidence interval (Student's t over the pairs); None for a single pair.
        log_deviation: standard deviation of the logarithm of the ratio to the baseline over the pairs; None for a single pair,
            if a value is not positive, or if all ratios are equal.
    """

    mean: float
    relative: float
    pairs: int
    unit: Unit = "seed"
    low: float | None = None
    high: float | None = None
    log_deviation: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the confidence interval excludes 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)

    def pairs_to_resolve(self, relative: float) -> int | None:
        """Return the number of pairs that a test needs to find a relative difference; None if the noise is not known.

        The paired t-test of the logarithms is two-sided, at the level 5 % and with a power of 80 %.
        """
        return None if self.log_deviation is None else pairs_needed(math.log1p(relative) / self.log_deviation)

    def limits_of_pairs(self, relative: float) -> tuple[int, int] | None:
        """Return the 95 % interval of :meth:`pairs_to_resolve`, from that of the standard deviation (χ² distribution)."""
        if self.log_deviation is None:
            return None
        freedom = self.pairs - 1
        quantiles = stats.chi2.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], freedom)
        low, high = (self.log_deviation * math.sqrt(freedom / quantile) for quantile in quantiles)
        return pairs_needed(math.log1p(relative) / low), pairs_needed(math.log1p(relative) / high)


@dataclass(frozen=True)
class WindowCount:
    """How many evaluation windows resolve the difference between two rows, and how many were measured.

    Its noise is the spread of the difference over the windows, for these pruned models.
    """

    needed: int
    measured: int


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the logarithm of a metric.

    Attributes:
        within: over the replicates of a seed, which differ by rounding alone; pooled over the seeds.
        replicates: number of runs in seeds with several replicates.
        between: over the means of the seeds; None for a single seed.
        seeds: number of seeds.
    """

    within: float
    replicates: int
    between: float | None
    seeds: int


@dataclass
class Cell:
    """Runs that differ only in their seed and replicate.

    Attributes:
        values: value of each run.
        draws: fingerprint of each run's calibration data; None for a dense model.
        runs: run records.
        best: whether the mean is the best of its column.
    """

    values: dict[Repeat, float] = field(default_factory=dict)
    draws: dict[Repeat, str | None] = field(default_factory=dict)
    runs: dict[Repeat, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    difference: Difference | None = None
    windows: WindowCount | None = None
    published: Published | None = None
    best: bool = False

    @property
    def seeds(self) -> list[int]:
        return sorted({repeat.seed for repeat in self.values})

    @property
    def unit(self) -> Unit:
        return "replicate" if len(self.seeds) == 1 and len(self.values) > 1 else "seed"

    @property
    def mean(self) -> float:
        """Mean over the seeds of the mean over the replicates of a seed."""
        return statistics.fmean(map(statistics.fmean, by_seed(self.values).values()))

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.values.values()))

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the units; None for a single one or if a value is not finite."""
        averages = unit_means(self.values)
        return statistics.stdev(averages) if len(averages) > 1 and self.finite else None

    @property
    def noise(self) -> Noise | None:
        """The spread within and between seeds; None without replicates or if a value is not finite and positive."""
        if not self.finite or any(value <= 0 for value in self.values.values()):
            return None
        logarithms = by_seed({repeat: math.log(value) for repeat, value in self.values.items()})
        repeated = [values for values in logarithms.values() if len(values) > 1]
        if not repeated:
            return None
        freedom = sum(len(values) - 1 for values in repeated)
        within = math.sqrt(sum(statistics.variance(values) * (len(values) - 1) for values in repeated) / freedom)
        averages = [statistics.fmean(values) for values in logarithms.values()]
        between = statistics.stdev(averages) if len(averages) > 1 else None
        return Noise(within, sum(map(len, repeated)), between, len(averages))


def by_seed(values: Mapping[Repeat, float]) -> dict[int, list[float]]:
    """Group values by their seed."""
    groups: dict[int, list[float]] = {}
    for repeat, value in values.items():
        groups.setdefault(repeat.seed, []).append(value)
    return groups


def unit_means(values: Mapping[Repeat, float]) -> list[float]:
    """Return the mean of each seed or, for a single seed, all values."""
    groups = by_seed(values)
    return [statistics.fmean(group) for group in groups.values()] if len(groups) > 1 else list(values.values())


def paired_difference(cell: Cell, baseline: Cell) -> Difference | None:
    """Return the difference over the pairs of runs with equal calibration data; None without such pairs.

    The runs of a pair have the same seed and replicate.
    """
    pairs = [r for r in cell.values if r in baseline.values and cell.draws[r] == baseline.draws[r]]
    if not pairs or not (cell.finite and baseline.finite):
        return None
    differences = unit_means({repeat: cell.values[repeat] - baseline.values[repeat] for repeat in pairs})
    mean = statistics.fmean(differences)
    reference = statistics.fmean(unit_means({repeat: baseline.values[repeat] for repeat in pairs}))
    relative = mean / reference if reference else math.nan
    unit: Unit = "replicate" if len({repeat.seed for repeat in pairs}) == 1 and len(pairs) > 1 else "seed"
    if len(differences) == 1:
        return Difference(mean, relative, 1, unit)
    count = len(differences)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    log_deviation = None
    if all(values[repeat] > 0 for values in (cell.values, baseline.values) for repeat in pairs):
        ratios = {repeat: math.log(cell.values[repeat] / baseline.values[repeat]) for repeat in pairs}
        log_deviation = statistics.stdev(unit_means(ratios)) or None  # 0: equal runs have no noise to estimate
    return Difference(mean, relative, count, unit, mean - half, mean + half, log_deviation)


def windows_needed(cell: Cell, baseline: Cell, metric: str) -> WindowCount | None:
    """Return how many evaluation windows resolve the difference of a metric, paired by window.

    Differences are averaged over the runs that both cells have. For perplexity, they are those of the log-likelihoods.

    Returns:
        None if the records do not contain the values of at least two windows, or if their differences do not vary.
    """
    differences = []
    for repeat in [r for r in cell.values if r in baseline.values and cell.draws[r] == baseline.draws[r]]:
        own, other = (each.runs[repeat].get("windows", {}).get(metric, []) for each in (cell, baseline))
        if len(own) < 2 or len(own) != len(other):
            return None
        differences.append([a - b for a, b in zip(own, other, strict=True)])
    means = [statistics.fmean(values) for values in zip(*differences, strict=True)]
    if len(means) < 2 or not all(map(math.isfinite, means)) or not statistics.fmean(means):
        return None
    spread = statistics.stdev(means)
    return WindowCount(pairs_needed(statistics.fmean(means) / spread), len(means)) if spread else None


def pairs_needed(effect: float) -> int:
    """Return the smallest number of pairs for which a two-sided paired t-test has the power :data:`POWER`.

    Args:
        effect: mean difference in multiples of the standard deviation of the differences, not 0.
    """
    if abs(effect) < SMALL_EFFECT:
        return math.ceil(((stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)) / effect) ** 2)

    def power(count: int) -> float:
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
        shift = abs(effect) * math.sqrt(count)
        return float(stats.nct.sf(critical, count - 1, shift) + stats.nct.cdf(-critical, count - 1, shift))

    high = 2
    while power(high) < POWER:
        high *= 2
    low = max(high // 2, 1)  # the power rises with the number of pairs: halve the interval
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def mark_best(cells: Mapping[str, Cell], lower: bool) -> None:
    """Mark the best mean in a column of pruned models, if at least two are finite."""
    means = {name: cell.mean for name, cell in cells.items() if math.isfinite(cell.mean)}
    if len(means) > 1:
        best = min(means.values()) if lower else max(means.values())
        for name, mean in means.items():
            cells[name].best = mean == best
