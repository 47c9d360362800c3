"""Trackers: logged values, read back from the files they write."""

from __future__ import annotations

import csv
import functools
import importlib
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from rose_exp.cli.command import check_command
from rose_exp.report import collect_records
from rose_exp.runs.language import LanguageRun
from rose_exp.runs.reuse import interrupted_trackers
from rose_exp.runs.run import run_experiment
from rose_exp.runtime.signals import EXIT_STATUS, Interrupted
from rose_exp.settings.schema import read_settings
from rose_exp.settings.tracking import CsvSettings
from rose_exp.tracking import Identity, RunRecord, TrackedRun, Trackers, read_record
from rose_exp.tracking.tracker import LAYER_NUMBERS
from rose_exp.tracking.trackers import BUILT_IN
from rose_exp.tracking.trackers.csv import Csv

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
    config = config(
        "tracking=wandb", "tags=[a,b]", "tracking.wandb.job_type=test", "save=true", "tracking.wandb.save_model=true"
    )
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
    place = {"kind": "wandb", "mode": "offline", "project": "rose_exp", "entity": None, "save_model": True}
    assert record["tracking"] == [place | {"failure": None, "id": found.run.run_id}]
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
    config = config("tracking=[csv,wandb]")
    record = run_experiment(read_settings(config), config, tmp_path)
    assert record["status"] == "finished"
    assert record["metrics"]["perplexity.local"] > 1
    stage = {"init": "start", "log": "layer"}[broken]
    failures = {entry["kind"]: entry["failure"] for entry in record["tracking"]}
    assert failures == {"wandb": f"{stage}: ConnectionError: no route to host", "csv": None}
    assert record["tracked"] == [{"kind": "csv"}]
    assert read_record(tmp_path / "run.json")["tracking"] == record["tracking"]
    assert "tracking with wandb failed, the run continues without it" in caplog.text
    with (tmp_path / "layers.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [layer["name"] for layer in record["layers"]]


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
    for overrides in (["tracking=none"], ["tracking=wandb", "tracking.wandb.mode=disabled"]):
        config_of = config(*overrides)
        record = run_experiment(read_settings(config_of), config_of, tmp_path)
        assert "tracking" not in record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "run.json"]


class Recorder:
    """A tracker that keeps what it receives."""

    def __init__(self, settings):
        self.received = []

    def __getattr__(self, name):
        return lambda *arguments: self.received.append((name, arguments))


def trackers_of(folder, *overrides, identity=None, **data) -> tuple[Trackers, RunRecord]:
    """Return started trackers, and the record of a run without layers."""
    settings = check_command(list(overrides)).jobs[0].settings
    record = RunRecord(folder, {}, "ROSE", "0")
    record.data |= data
    return Trackers(settings, record, folder, identity), record


def test_trackers_receive_no_secrets(tmp_path, monkeypatch):
    secret = "hf_" + "a1B2" * 8
    monkeypatch.setenv("MY_SECRET", "supersecretvalue")
    monkeypatch.setitem(BUILT_IN, "csv", Recorder)
    identity, config = Identity(f"tags={secret}", secret), {"x": secret, "password": "pw1"}
    trackers, record = trackers_of(tmp_path, "tracking=csv", f"tags=[{secret},a]", identity=identity, config=config)
    trackers.log("layer", 0, {"name": secret, "error": 0.5})
    trackers.log("results", {f"perplexity.{secret}": 1.0}, [{"name": "supersecretvalue"}])
    received = repr(trackers.trackers[0].tracker.received)
    trackers.finish(failed=False)
    assert not any(text in received + repr(record.data["tracked"]) for text in (secret, "supersecretvalue", "pw1"))
    assert "'error': 0.5" in received
    assert "'password': '***'" in received


def test_names_of_wandb_runs_contain_no_secrets(tmp_path, monkeypatch):
    secret, received = "hf_" + "a1B2" * 8, {}
    monkeypatch.setattr("wandb.init", lambda **arguments: received.update(arguments) or SimpleNamespace(id="1"))
    trackers, record = trackers_of(tmp_path, "tracking=wandb", *(f"tracking.wandb.{n}=a-{secret}" for n in ("name", "project")))
    assert (received["name"], received["project"]) == ("a-***", "a-***")
    assert secret not in repr(record.data["tracking"])
    assert trackers.trackers[0].entry["failure"] is None


class Failing(Recorder):
    def results(self, *arguments):
        raise OSError("full")

    def finish(self, failed):
        raise ValueError("closed")


def test_each_failure_is_recorded_and_stops_only_its_tracker(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILT_IN, "csv", Failing)
    monkeypatch.setitem(BUILT_IN, "tensorboard", Recorder)
    earlier = [{"kind": "csv"}, {"kind": "tensorboard"}]
    trackers, record = trackers_of(tmp_path, "tracking=[csv,tensorboard]", tracked=earlier[1:], tracking={"kind": "wandb"})
    failing, working = sorted(trackers.trackers, key=lambda tracker: tracker.name)
    for name in ("results", "figure"):
        trackers.log(name, {}, [])
    trackers.finish(failed=False)
    assert [name for name, _ in failing.tracker.received] == ["start"]  # nothing after the failure but finish
    assert [name for name, _ in working.tracker.received] == ["start", "results", "figure", "finish"]
    failures = {entry["kind"]: entry.get("failure") for entry in record.data["tracking"]}
    assert failures == {"wandb": None, "tensorboard": None, "csv": "results: OSError: full"}  # the first failure
    assert record.data["tracked"] == [{"kind": "tensorboard"}]


def test_interrupted_run_continues_its_wandb_run(config, tmp_path, monkeypatch):
    """Each process writes a folder with all layers, and the same ID. A finished or discarded run is not continued."""
    configs = {name: config("tracking=[csv,wandb]", "method=wanda", *extra) for name, extra in RESUMED.items()}
    settings = {name: read_settings(values) for name, values in configs.items()}

    def stopped(*_arguments):
        raise Interrupted("stopped by SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(LanguageRun, "measure", stopped)
        with pytest.raises(Interrupted):
            run_experiment(settings["same"], configs["same"], tmp_path)
    (first,) = (entry["id"] for entry in read_record(tmp_path / "run.json")["tracking"] if entry["kind"] == "wandb")
    ids = {name: _wandb_id(settings[name], tmp_path, monkeypatch) for name in ("other", "rerun")}
    assert first not in ids.values()
    record = run_experiment(settings["same"], configs["same"], tmp_path)
    assert record["tracking"][0]["id"] == first
    folders = [path.name.rpartition("-")[2] for path in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert folders == [first, first]
    assert interrupted_trackers(settings["same"], tmp_path) == []


RESUMED = {"same": [], "other": ["tracking.wandb.project=other"], "rerun": ["rerun=true"]}


def _wandb_id(settings, folder, monkeypatch) -> str | None:
    """Return the ID of the W&B run that a run with these settings would continue."""
    received = {}
    with monkeypatch.context() as patch:
        patch.setattr("wandb.init", lambda **arguments: received.update(arguments) or SimpleNamespace(id="new"))
        record = SimpleNamespace(data={"label": "", "run_id": "", "config": {}}, kept=True)
        Trackers(settings, record, folder / "nothing", earlier=interrupted_trackers(settings, folder))
    return received["id"]


MODULE = """
import json, pathlib
events = []
class Config(dict):
    def update(self, values, allow_val_change): events.append(["config", values])
config = Config()
class Run:
    def log(self, values, step=None): events.append(["log", values, step])
    def finish(self): events.append(["finish"])
def init(**arguments):
    events.append(["init", arguments])
    return Run()
"""


def test_accelerate_passes_settings_and_numbers_on(tmp_path, monkeypatch):
    """A module stands in for Trackio."""
    (tmp_path / "trackio.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = ["tracking=accelerate", "tracking.accelerate.tracker=trackio", "+tracking.accelerate.options.space_id=me/x"]
    identity, config = Identity("seed=1", "sweep"), {"model": {"path": None, "omit": ["a"]}, "seed": 1}
    trackers, record = trackers_of(tmp_path, *overrides, "tags=[t]", identity=identity, config=config)
    layer = dict.fromkeys(LAYER_NUMBERS, 0.5) | {"name": "a"}
    trackers.log("layer", 3, layer)
    trackers.log("results", {"perplexity.local": 2.0}, [layer])
    trackers.log("keep", tmp_path / "run.json", None)
    trackers.finish(failed=True)
    (_, named), (_, stored), *logged = importlib.import_module("trackio").events
    assert named == {"project": "rose_exp", "name": "seed=1", "group": "sweep", "space_id": "me/x"}
    assert stored["model.omit"] == '["a"]'
    assert (stored["seed"], stored["run_id"], stored["tags"], stored["group"]) == (1, "0", '["t"]', "sweep")
    assert logged[0] == ["log", dict.fromkeys((f"layer/{name}" for name in LAYER_NUMBERS), 0.5), 3]
    assert logged[1:] == [["log", {"perplexity.local": 2.0}, None], ["log", {"failed": 1.0}, None], ["finish"]]
    assert record.data["tracking"][0]["failure"] is None
    sys.modules.pop("trackio")


def test_csv_cells_are_no_formulas(tmp_path):
    tracker = Csv(CsvSettings())
    tracker.start(TrackedRun(Identity("x"), {}, tmp_path))
    tracker.layer(0, {"name": "=cmd|' /C calc'!A0", "error": -0.5})
    tracker.results({"@SUM(A1)": -1.5}, [])
    tracker.finish(failed=False)
    with (tmp_path / "layers.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "0", "name": "'=cmd|' /C calc'!A0", "error": "-0.5"}]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "'@SUM(A1),-1.5"
