"""Replicates in reports: averages, intervals, the spread within and between seeds, and the required number of pairs."""

from __future__ import annotations

import csv
import io
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from rose_exp.cli.report import main
from rose_exp.report.cells import pairs_needed
from rose_exp.report.gather import gather
from rose_exp.report.page import web_page
from rose_exp.report.text import comma_separated, latex, markdown

from .records import record

METRIC = "perplexity.wikitext2"


def runs(label: str, values: dict[tuple[int, int], float], **options) -> list[dict]:
    return [
        record(label, value, seed, config__calibration__replicate=replicate, **options)
        for (seed, replicate), value in values.items()
    ]


def cell(records: list[dict], row: str = "ROSE", **options):
    (table,) = [table for table in gather(records, **options).tables if table.metric == METRIC]
    return table.cells[row]["0.7"]


def test_replicates_are_averaged_before_seeds():
    values = {(0, 0): 10.0, (0, 1): 14.0, (1, 0): 20.0}
    found = cell(runs("ROSE", values))
    assert found.mean == pytest.approx((12 + 20) / 2)
    assert found.deviation == pytest.approx(statistics.stdev([12, 20]))
    assert found.seeds == [0, 1]


def test_replicates_of_one_seed_give_the_spread():
    found = cell(runs("ROSE", {(3, k): 10.0 + k for k in range(4)}))
    assert found.deviation == pytest.approx(statistics.stdev([10, 11, 12, 13]))
    assert found.unit == "replicate"


def test_a_missing_setting_is_replicate_0():
    old = record("ROSE", 10.0)
    assert "replicate" not in old["config"]["calibration"]
    found = cell([old, *runs("ROSE", {(0, 1): 12.0})])
    assert found.mean == 11.0


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("replicates", [1, 2, 4])
def test_intervals_agree_with_scipy(seeds, replicates):
    random = np.random.default_rng(10 * seeds + replicates)
    keys = [(seed, replicate) for seed in range(seeds) for replicate in range(replicates)]
    base = {key: float(random.uniform(20, 30)) for key in keys}
    rose = {key: value * float(random.uniform(0.8, 1.1)) for key, value in base.items()}
    found = cell(runs("SparseGPT", base) + runs("ROSE", rose)).difference
    if seeds > 1:
        units = [[statistics.fmean(of[seed, k] for k in range(replicates)) for seed in range(seeds)] for of in (rose, base)]
    else:
        units = [list(of.values()) for of in (rose, base)]
    assert found.pairs == len(units[0])
    assert found.unit == ("replicate" if seeds == 1 and replicates > 1 else "seed")
    assert found.mean == pytest.approx(statistics.fmean(units[0]) - statistics.fmean(units[1]))
    if found.pairs == 1:
        assert found.low is None
        assert found.log_deviation is None
        return
    interval = stats.ttest_rel(*units).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(interval))
    ratios = {key: math.log(rose[key] / base[key]) for key in keys}
    logs = [statistics.fmean(ratios[seed, k] for k in range(replicates)) for seed in range(seeds)]
    assert found.log_deviation == pytest.approx(statistics.stdev(logs if seeds > 1 else ratios.values()))


def test_runs_of_other_replicates_are_not_paired():
    found = cell(runs("SparseGPT", {(0, 0): 20.0, (0, 1): 30.0}) + runs("ROSE", {(0, 1): 27.0, (0, 2): 1.0})).difference
    assert found.pairs == 1
    assert found.mean == -3.0


def test_noise_within_and_between_seeds():
    random = np.random.default_rng(0)
    values = {(seed, k): math.exp(3 + 0.2 * seed + 0.1 * random.standard_normal()) for seed in range(3) for k in range(5)}
    found = cell(runs("ROSE", values)).noise
    groups = [[math.log(values[seed, k]) for k in range(5)] for seed in range(3)]
    assert found.within == pytest.approx(math.sqrt(statistics.fmean(map(statistics.variance, groups))))
    assert found.between == pytest.approx(statistics.stdev(map(statistics.fmean, groups)))
    assert (found.replicates, found.seeds) == (15, 3)


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_noise_of_values_without_logarithm_is_unknown(value):
    assert cell(runs("ROSE", {(0, 0): 10.0, (0, 1): value})).noise is None


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (-0.5, 34), (3.0, 4)])
def test_required_pairs_agree_with_tables_of_the_paired_t_test(effect, pairs):
    """Values for a power of 0.8 at the level 0.05, two-sided, as G*Power gives them (Cohen 1988)."""
    assert pairs_needed(effect) == pairs


def test_required_pairs_have_the_stated_power():
    random, effect = np.random.default_rng(1), 0.7
    draws = effect + random.standard_normal((20_000, pairs_needed(effect)))
    rejected = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert 0.79 < rejected.mean() < 0.85


NOISY = {"SparseGPT": {(0, 0): 20.0, (0, 1): 22.0, (0, 2): 25.0}, "ROSE": {(0, 0): 21.0, (0, 1): 20.5, (0, 2): 24.5}}


def test_report_shows_noise_and_required_pairs():
    records = [run for label, values in NOISY.items() for run in runs(label, values)]
    report = gather(records, resolve=0.05)
    text = markdown(report)
    assert "seeds 0; replicates 0, 1, 2; mean ± standard deviation over the replicates" in text
    heading = "Difference to SparseGPT, paired by seed and replicate (one seed: its noise is that of rounding alone), with 95 %"
    assert heading in text
    assert "%, within noise) |" in text
    assert "Standard deviation of the logarithm over the replicates of a seed / over the seeds:" in text
    assert "| SparseGPT | 0.11 (3 runs) |" in text
    found = cell(records).difference
    count = pairs_needed(math.log(1.05) / found.log_deviation)
    low, high = found.limits_of_pairs(0.05)
    assert low < count < high
    assert f"| ROSE | {count} replicates [{low}, {high}] ({count - 3} more) |" in text
    assert "Pairs that resolve a difference of 0.05 to SparseGPT" in text
    page = web_page(report)
    assert f"{count} replicates [{low}, {high}] ({count - 3} more)" in page
    assert "Pairs that resolve" not in markdown(gather(records))
    row = next(row for row in csv.DictReader(io.StringIO(comma_separated(report))) if row["method"] == "ROSE")
    assert (row["seeds"], row["replicates"]) == ("0", "0 1 2")
    assert "22.00" in latex(report)


def test_significant_differences_are_not_marked():
    records = runs("SparseGPT", NOISY["SparseGPT"]) + runs("ROSE", {(0, 0): 10.0, (0, 1): 12.0, (0, 2): 15.0})
    text = markdown(gather(records))
    assert "(-44.8%) |" in text
    assert "within noise" not in text


def test_equal_runs_do_not_fail():
    """A method that does not depend on rounding has equal replicates."""
    same = {(0, k): 20.0 for k in range(3)}
    text = markdown(gather(runs("SparseGPT", same) + runs("ROSE", same), resolve=0.05))
    assert "| ROSE | +0.00 [+0.00, +0.00] (+0.0%, within noise) |" in text
    assert "| ROSE | 0 (3 runs) |" in text


@pytest.mark.parametrize("value", ["0", "nan", "-1", "inf", "5%", ""])
def test_resolve_rejects_what_is_no_relative_difference(value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), f"--resolve={value}"])
    assert f"argument --resolve: expected a relative difference such as 0.05, got {value!r}" in capsys.readouterr().err


def with_windows(label: str, values: list[float], metric: str = METRIC, replicate: int = 0) -> dict:
    made = record(label, 20.0, config__calibration__replicate=replicate)
    return made | {"windows": {metric: values}}


def test_windows_that_resolve_a_difference():
    random = np.random.default_rng(2)
    base = random.normal(3, 0.4, 16)
    rose = base - 0.05 + random.normal(0, 0.1, 16)
    records = [with_windows("SparseGPT", list(base)), with_windows("ROSE", list(rose))]
    found = cell(records).windows
    effect = np.mean(rose - base) / np.std(rose - base, ddof=1)
    assert (found.needed, found.measured) == (pairs_needed(effect), 16)
    assert f"| ROSE | {found.needed} (measured 16) |" in markdown(gather(records, resolve=0.05))
    assert "Evaluation windows" not in markdown(gather(records))


def test_windows_are_averaged_over_runs():
    """Noise of single runs cancels, as in their mean."""
    one, two = [3.0, 4.0, 5.0], [3.5, 3.0, 5.5]
    records = [with_windows("SparseGPT", [3.0] * 3, replicate=k) for k in (0, 1)]
    records += [with_windows("ROSE", values, replicate=k) for k, values in enumerate((one, two))]
    means = [(a + b) / 2 - 3 for a, b in zip(one, two, strict=True)]
    assert cell(records).windows.needed == pairs_needed(statistics.fmean(means) / statistics.stdev(means))


@pytest.mark.parametrize(
    ("own", "other"),
    [
        *(([], []), ([3.0], [3.1]), ([3.0, 3.0], [3.1])),
        *(([3.0, 4.0], [3.0, 4.0]), ([3.0, 4.0], [3.5, 4.5]), ([3.0, math.nan], [3, 4])),
    ],
    ids=["none", "one", "other windows", "equal", "constant difference", "not finite"],
)
def test_windows_without_a_noise_to_estimate(own, other):
    records = [with_windows("SparseGPT", own), with_windows("ROSE", other)]
    assert cell(records).windows is None
    markdown(gather(records, resolve=0.05))


def test_small_effects_agree_with_the_exact_test():
    """At the boundary, the normal approximation and Student's t give the same number within 0.02 %."""
    assert pairs_needed(0.0199999) == pytest.approx(pairs_needed(0.0200001), rel=2e-4)
    assert pairs_needed(1e-6) == pytest.approx(7.849e12, rel=1e-3)


def test_limits_of_pairs_cover_the_required_number():
    """The interval of the number of pairs contains the true number in 95 % of all estimates."""
    random, true = np.random.default_rng(3), pairs_needed(math.log(1.05) / 0.05)
    covered = 0
    for logs in 0.05 * random.standard_normal((300, 6)):
        base = {(0, k): 20.0 for k in range(6)}
        rose = {(0, k): 20.0 * math.exp(0.02 + log) for k, log in enumerate(logs)}
        low, high = cell(runs("SparseGPT", base) + runs("ROSE", rose)).difference.limits_of_pairs(0.05)
        covered += low <= true <= high
    assert 0.92 < covered / 300 <= 1


def test_a_baseline_of_zero_has_no_relative_difference():
    found = cell(runs("SparseGPT", {(0, 0): 0.0}) + runs("ROSE", {(0, 0): 1.0}))
    assert math.isnan(found.difference.relative)
    markdown(gather(runs("SparseGPT", {(0, 0): 0.0}) + runs("ROSE", {(0, 0): 1.0})))


def test_code_of_other_packages_identifies_a_row():
    one, other = ({"protocol__plugins": {"rose_exp.scores": f"mine 1.0, SHA-256 {digest}"}} for digest in ("aa", "bb"))
    records = [record("SparseGPT", 20.0), record("ROSE", 10.0, **one), record("ROSE", 20.0, 1, **other)]
    (table,) = [table for table in gather(records).tables if table.metric == METRIC]
    assert set(table.cells) == {
        "SparseGPT",
        "ROSE (scores=mine 1.0, SHA-256 aa)",
        "ROSE (scores=mine 1.0, SHA-256 bb)",
    }
