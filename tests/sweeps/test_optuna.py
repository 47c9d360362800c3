"""Optuna searches and resuming of their studies."""

from __future__ import annotations

import os
import subprocess
import sys

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from rose_exp.report import collect_records
from rose_exp.sweeps.search import SearchError, distribution
from rose_exp.sweeps.study import exclusive, open_study, storage_errors

from ..cli.test_app import rose_exp
from ..cli.test_command import problems_of
from ..conftest import REPOSITORY


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
    assert distribution(OverridesParser.create().parse_override(override)) == expected


def test_interval_of_an_integer_setting_is_an_integerdistribution():
    override = OverridesParser.create().parse_override("engine.block_size=interval(32,256)")
    assert distribution(override, whole=True) == IntDistribution(32, 256)


def test_globs_raise_an_error():
    with pytest.raises(SearchError, match="expected an interval, a range or a choice"):
        distribution(OverridesParser.create().parse_override("a=glob(*)"))


SEARCH = ["-m", "hydra/sweeper=optuna", "method=rose", "engine.block_size=32", "engine.damping=0.01"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["hydra.sweeper.metric=perplexity.embeded"],
            "hydra.sweeper.metric: expected one of sparsity, reordered_layers, perplex",
        ),
        (["hydra.sweeper.metric=zero_shot.piqa"], "hydra.sweeper.metric: expected one of"),
        (["hydra.sweeper.direction=min"], "hydra.sweeper.direction: expected 'minimize' or 'maximize', got 'min'"),
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials: expected at least 1, got 0"),
        (["hydra.sweeper.n_jobs=-1"], "hydra.sweeper.n_jobs: expected at least 1, got -1"),
        (["hydra.sweeper.seed=-1"], "hydra.sweeper.seed: expected at least 0, got -1"),
        (["hydra.sweeper.study_name=''"], "hydra.sweeper.study_name: expected text that is not empty, got ''"),
        (["+hydra.sweeper.n_trails=3"], "hydra.sweeper.n_trails: no such setting, got 3; did you mean 'n_trials'?"),
        (["hydra.sweeper.storage=db"], "hydra.sweeper.storage: expected the URL of a database such as sqlite:///"),
        (["sparsity.ratio=interval(0.9,0.5)"], "sparsity.ratio: expected an ascending interval or range"),
        (["engine.damping=tag(log,interval(0,0.5))"], "engine.damping: expected an ascending interval or range, above 0"),
        (["method=glob(*)"], "method: expected an interval, a range or a choice to search, got 'method=glob(*)'"),
    ],
)
def test_errors_of_a_search_are_reported_before_the_first_trial(arguments, expected):
    problems = problems_of(*SEARCH, *arguments)
    assert len(problems) == 1
    assert problems[0].startswith(expected)


def test_errors_of_a_search_are_reported_with_the_other_errors():
    problems = problems_of(*SEARCH, "hydra.sweeper.n_trials=0", "calibration.sample=3")
    assert [problem.partition(":")[0] for problem in problems] == ["calibration.sample", "hydra.sweeper.n_trials"]


def opened(folder, searched: str, direction: str = "minimize") -> optuna.Study:
    return open_study(f"sqlite:///{folder}/optuna.db", "test", direction, searched, folder)


def test_study_without_complete_trials_accepts_other_settings(tmp_path):
    study = opened(tmp_path, "with a wrong metric")
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask()  # interrupted
    corrected = opened(tmp_path, "with the correct metric", "maximize")
    assert corrected.direction.name == "MAXIMIZE"
    assert corrected.trials == []
    corrected.tell(corrected.ask(), 1.0)
    with pytest.raises(SearchError, match="study 'test' in .* has other settings; choose another name"):
        opened(tmp_path, "with a wrong metric")
    assert len(opened(tmp_path, "with the correct metric", "maximize").trials) == 1


def test_second_process_on_a_study_is_refused(tmp_path):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    with exclusive(storage, "a", tmp_path):
        with (
            pytest.raises(SearchError, match="another process is working on study 'a'"),
            exclusive(storage, "a", tmp_path / "b"),
        ):
            pass
        with exclusive(storage, "b", tmp_path):
            pass
    with exclusive(storage, "a", tmp_path):
        pass


@pytest.mark.parametrize("storage", ["sqlite:////proc/nothing/optuna.db", "mysql+nothing://host/db"])
def test_unusable_storage_is_one_error(storage, tmp_path):
    refused = pytest.raises(SearchError, match="hydra.sweeper.storage: cannot")
    with refused, exclusive(storage, "a", tmp_path), storage_errors(storage):
        open_study(storage, "a", "minimize", "", tmp_path)


PLUGIN = """
from dataclasses import dataclass, field
from hydra.core.config_store import ConfigStore

@dataclass
class Conf:
    _target_: str = "hydra_plugins.hydra_other_sweeper.Other"
    defaults: list = field(default_factory=lambda: [{"sampler": "tpe"}])

ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=Conf, provider="other")
"""


def test_other_plugin_with_the_same_name_is_ignored(tmp_path):
    """hydra-optuna-sweeper registers a schema for hydra/sweeper=optuna, with which this project's file is incompatible."""
    (tmp_path / "hydra_plugins" / "hydra_other_sweeper").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "hydra_other_sweeper" / "__init__.py").write_text(PLUGIN)
    code = f"from rose_exp.cli.command import check_command; print(len(check_command({SEARCH}).jobs))"
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2", done.stderr


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
