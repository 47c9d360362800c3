"""Trackers: logged values, read back from the files they write."""

from __future__ import annotations

import csv
import functools
import json
import signal
import subprocess
import sys
import time

import pytest

from rose_exp.report import collect_records
from rose_exp.runs.run import run_experiment
from rose_exp.runtime.signals import EXIT_STATUS
from rose_exp.settings.schema import read_settings
from rose_exp.settings.tracking import TrackingSettings
from rose_exp.tracking import FailSafeTracker, Identity, RunRecord, read_record
from rose_exp.tracking.trackers import KINDS, Csv

from ..cli.test_app import rose_exp
from .offline import read_offline_run

LAYERS = 35


@pytest.fixture
def config(small):
    """Return a function that composes the resolved configuration of a small run with extra overrides."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from rose_exp.cli.command import config_folder

    def composed(*overrides):
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return OmegaConf.to_container(compose("config", overrides=[*small, *overrides]), resolve=True)

    return composed


def test_offline_wandb_run_contains_all_values(config, tmp_path):
    config = config("tracking=wandb", "tags=[a,b]", "tracking.job_type=test", "save=true", "tracking.save_model=true")
    record = run_experiment(read_settings(config), config, tmp_path, Identity("method=rose", "day/sweep"))
    found = read_offline_run(tmp_path)
    assert (found.run.display_name, found.run.run_group, found.run.job_type) == ("method=rose", "day/sweep", "test")
    assert list(found.run.tags) == ["a", "b"]
    assert found.config["calibration"] == config["calibration"]
    assert (found.config["label"], found.config["run_id"]) == (record["label"], record["run_id"]) == ("ROSE", record["run_id"])
    steps = [step for step in found.history if "layer/error" in step]
    assert [step["layer/name"] for step in steps] == [layer["name"] for layer in record["layers"]]
    assert [step["layer/error"] for step in steps] == [layer["error"] for layer in record["layers"]]
    assert [step["_step"] for step in steps] == list(range(LAYERS))
    assert {"layer/relative_range", "layer/reordered", "layer/damping", "layer/seconds"} <= set(steps[0])
    assert found.summary["perplexity.local"] == record["metrics"]["perplexity.local"]
    assert found.summary["sparsity"] == record["metrics"]["sparsity"]
    assert found.summary["reordered_layers"] == record["metrics"]["reordered_layers"]
    assert found.summary["layers/nrows"] == LAYERS
    assert found.summary["figures/layers/_type"] == "image-file"
    assert {artifact.type for artifact in found.artifacts} >= {"run-record", "model"}
    assert found.exit_code == 0
    assert record["tracking"] == {"kind": "wandb", "failure": None}
    place = {"kind": "wandb", "mode": "offline", "project": "rose_exp", "entity": None, "save_model": True}
    assert record["tracked"] == [place]


def test_failed_run_is_closed_as_failed(config, tmp_path):
    config = config("tracking=wandb", "calibration.window=4000")
    with pytest.raises(Exception, match="calibration.window"):
        run_experiment(read_settings(config), config, tmp_path)
    assert read_offline_run(tmp_path).exit_code == 1
    assert read_record(tmp_path / "run.json")["status"] == "failed"


@pytest.mark.slow
def test_interrupted_run_is_closed_as_failed_by_trackers(small, tmp_path):
    command = [sys.executable, "-m", "rose_exp", *small, "calibration.samples=2000", "tracking=wandb", "hydra.run.dir=out"]
    restore_sigint = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in the background of a shell
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=restore_sigint
    )
    deadline = time.monotonic() + 120
    while "pruned model.layers.0" not in _log(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == EXIT_STATUS
    record = read_record(tmp_path / "out/run.json")
    assert (record["status"], record["error"].partition(":")[0]) == ("interrupted", "Interrupted")
    assert read_offline_run(tmp_path / "out").exit_code == 1


def _log(folder) -> str:
    path = folder / "out/rose-exp.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_jobs_of_a_sweep_are_isolated(small, tmp_path):
    done = rose_exp("-m", *small, "method=wanda,sparsegpt", "tracking=wandb", "hydra.sweep.dir=day/sweep", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = {record["config"]["method"]["name"]: path.parent for path, record in collect_records(tmp_path / "day/sweep")}
    for method in ("wanda", "sparsegpt"):
        folder = folders[method]
        found = read_offline_run(folder)
        assert (found.run.display_name, found.run.run_group) == (f"method={method}", "day/sweep")
        assert found.config["method"]["name"] == method
        assert len([step for step in found.history if "layer/error" in step]) == LAYERS
        metrics = json.loads((folder / "run.json").read_text())["metrics"]
        assert found.summary["perplexity.local"] == metrics["perplexity.local"]
        assert found.exit_code == 0


@pytest.mark.parametrize("broken", ["init", "log"])
def test_failing_tracker_does_not_stop_the_run(broken, config, tmp_path, monkeypatch, caplog):
    import wandb

    def fail(*_args, **_kwargs):
        raise ConnectionError("no route to host")

    if broken == "init":
        monkeypatch.setattr(wandb, "init", fail)
    else:
        monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", fail)
    config = config("tracking=wandb")
    record = run_experiment(read_settings(config), config, tmp_path)
    assert record["status"] == "finished"
    assert record["metrics"]["perplexity.local"] > 1
    stage = {"init": "start", "log": "layer"}[broken]
    assert record["tracking"] == {"kind": "wandb", "failure": f"{stage}: ConnectionError: no route to host"}
    assert "tracked" not in record
    assert read_record(tmp_path / "run.json")["tracking"] == record["tracking"]
    assert "tracking with wandb failed, the run continues without it" in caplog.text


def test_csv_values_match_the_run_record(config, tmp_path):
    config = config("tracking=csv")
    record = run_experiment(read_settings(config), config, tmp_path)
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], float(row["error"])) for row in rows] == [(x["name"], x["error"]) for x in record["layers"]]
    with (tmp_path / "metrics.csv").open() as file:
        assert {row["metric"]: float(row["value"]) for row in csv.DictReader(file)} == record["metrics"]
    assert "reordered_layers" in record["metrics"]


def test_tensorboard_values_match_the_run_record(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config("tracking=tensorboard")
    record = run_experiment(read_settings(config), config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    errors = [event.value for event in events.Scalars("layer/error")]
    assert errors == pytest.approx([layer["error"] for layer in record["layers"]])
    assert events.Tags()["images"] == ["figures/layers"]
    assert events.Scalars("perplexity.local")[0].value == pytest.approx(record["metrics"]["perplexity.local"])
    assert events.Scalars("reordered_layers")[0].value == record["metrics"]["reordered_layers"]


def test_disabled_trackers_write_no_files(config, tmp_path):
    for overrides in (["tracking=none"], ["tracking=wandb", "tracking.mode=disabled"]):
        config_of = config(*overrides)
        record = run_experiment(read_settings(config_of), config_of, tmp_path)
        assert "tracking" not in record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "run.json"]


class Recorder:
    """A tracker that keeps what it receives."""

    def __init__(self, *arguments):
        self.received = [arguments]

    def __getattr__(self, name):
        return lambda *arguments: self.received.append((name, arguments))


def test_trackers_receive_no_secrets(tmp_path, monkeypatch):
    secret = "hf_" + "a1B2" * 8
    monkeypatch.setenv("MY_SECRET", "supersecretvalue")
    monkeypatch.setitem(KINDS, "csv", Recorder)
    record = RunRecord(tmp_path, {"x": secret, "password": "pw1"}, "ROSE", "0", kept=False)
    record.kept = True
    settings = TrackingSettings(kind="csv", project=f"p {secret}", name="supersecretvalue")
    tracker = FailSafeTracker(settings, record, Identity(f"tags={secret}", secret), tmp_path, [secret, "a"])
    tracker.log("layer", 0, {"name": secret, "error": 0.5})
    tracker.log("results", {f"perplexity.{secret}": 1.0}, [{"name": "supersecretvalue"}])
    received = repr(tracker.tracker.received)
    tracker.finish(failed=False)
    assert not any(text in received + repr(record.data["tracked"]) for text in (secret, "supersecretvalue", "pw1"))
    assert "'error': 0.5" in received


def test_csv_cells_are_no_formulas(tmp_path):
    tracker = Csv(TrackingSettings(kind="csv"), {}, Identity("x"), tmp_path, [])
    tracker.layer(0, {"name": "=cmd|' /C calc'!A0", "error": -0.5})
    tracker.results({"@SUM(A1)": -1.5}, [])
    tracker.finish(failed=False)
    with (tmp_path / "layers.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "0", "name": "'=cmd|' /C calc'!A0", "error": "-0.5"}]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "'@SUM(A1),-1.5"
