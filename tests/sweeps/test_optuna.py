"""Optuna searches and resuming of their studies."""

from __future__ import annotations

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rose_exp.report import collect_records
from rose_exp.sweeps.optuna import SearchError, _distribution

from ..cli.test_app import rose_exp


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=interval(0.1,0.9)", FloatDistribution(0.1, 0.9)),
        ("a=interval(1,9)", FloatDistribution(1.0, 9.0)),
        ("a=tag(log,interval(0.001,0.1))", FloatDistribution(0.001, 0.1, log=True)),
        ("a=range(2,11,2)", IntDistribution(2, 10, step=2)),
        ("a=choice(32,64)", CategoricalDistribution(["32", "64"])),
        ("a=x,y", CategoricalDistribution(["x", "y"])),
    ],
)
def test_overrides_map_to_distributions(override, expected):
    assert _distribution(OverridesParser.create().parse_override(override)) == expected


def test_interval_of_an_integer_setting_is_an_integer_distribution():
    override = OverridesParser.create().parse_override("engine.block_size=interval(32,256)")
    assert _distribution(override, whole=True) == IntDistribution(32, 256)


def test_globs_raise_an_error():
    with pytest.raises(SearchError, match="expected an interval, a range or a choice"):
        _distribution(OverridesParser.create().parse_override("a=glob(*)"))


@pytest.mark.slow
def test_study_resumes_and_retries_an_interrupted_trial(small, tmp_path):
    search = ["-m", *small, "method=rose", "hydra/sweeper=optuna", "hydra.sweeper.metric=perplexity.local"]
    search += ["hydra.sweep.dir=out", "hydra.sweeper.study_name=test"]
    done = rose_exp(*search, "hydra.sweeper.n_trials=2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best of 2 trials: perplexity.local" in done.stdout

    storage = f"sqlite:///{tmp_path}/out/optuna.db"
    study = optuna.load_study(study_name="test", storage=storage)
    interrupted = study.ask(study.trials[0].distributions)  # simulates a trial whose process was killed
    done = rose_exp(*search, "hydra.sweeper.n_trials=3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = optuna.load_study(study_name="test", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert trials[3].params == interrupted.params
    assert len({tuple(trial.params.values()) for trial in trials}) == 3  # no parameters are sampled twice

    records = [record for _, record in collect_records(tmp_path / "out")]
    assert sorted(r["metrics"]["perplexity.local"] for r in records) == sorted(t.value for t in trials if t.value is not None)
    blocks = {record["config"]["engine"]["block_size"] for record in records}
    assert blocks == {int(trial.params["engine.block_size"]) for trial in trials}

    other = rose_exp(*search, "hydra.sweeper.n_trials=3", "sparsity.ratio=0.7", folder=tmp_path)
    assert other.returncode == 1
    assert "hydra.sweeper.study_name: study 'test'" in other.stderr
    assert "Traceback" not in other.stderr
