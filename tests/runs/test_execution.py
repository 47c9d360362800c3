"""Execution of runs: reuse, resuming, sweeps and locking."""

from __future__ import annotations

import copy
import csv
import fcntl
import json
import logging
import threading
from pathlib import Path

import pytest
import torch

import rose_exp
from rose_exp.cli import app
from rose_exp.cli.command import check_command
from rose_exp.pruning import RunState
from rose_exp.report.conditions import conditions
from rose_exp.runs import pruning
from rose_exp.runs.folder import RunFolder
from rose_exp.runs.reuse import lacking
from rose_exp.runtime import signals as interruption
from rose_exp.runtime.errors import RoseExpError, SettingsError
from rose_exp.runtime.signals import EXIT_STATUS, Interrupted
from rose_exp.sweeps.plan import format_plan

from ..conftest import small_overrides


def counted(monkeypatch) -> list[str]:
    """Return a list that grows with every run that is actually executed."""
    done = []
    real = pruning.prune_model
    monkeypatch.setattr(pruning, "prune_model", lambda *a, **k: done.append("pruned") or real(*a, **k))
    return done


def test_finished_run_is_reused(small, tmp_path, monkeypatch):
    done = counted(monkeypatch)
    first = rose_exp.run([*small, "method=rose"], tmp_path)
    assert (tmp_path / first["run_id"] / "run.json").exists()
    assert rose_exp.run([*small, "method=rose", "device=cpu", "tags=[again]"], tmp_path) == first
    assert len(done) == 1
    again = rose_exp.run([*small, "method=rose", "rerun=true"], tmp_path)
    assert len(done) == 2
    assert again["metrics"] == first["metrics"]
    assert again["started"] > first["started"]


def test_missing_outputs_of_a_finished_run_are_created(small, tmp_path, monkeypatch):
    done = counted(monkeypatch)
    record = rose_exp.run([*small, "figures.draw=false"], tmp_path)
    folder = tmp_path / record["run_id"]
    rose_exp.run([*small, "figures.draw=false", "save=true"], tmp_path)
    assert (folder / "model" / "model.safetensors").exists()
    assert len(done) == 2
    assert not (folder / "figures").exists()
    rose_exp.run([*small, "save=true"], tmp_path)
    assert (folder / "figures" / "layers.png").exists()  # drawn from the record
    assert len(done) == 2
    rose_exp.run([*small, "figures.study=['*.0.self_attn.o_proj']"], tmp_path)
    assert len(done) == 3
    assert (folder / "figures" / "model.layers.0.self_attn.o_proj.json").exists()
    assert (folder / "model" / "model.safetensors").exists()  # the saved model is kept


def test_unfinished_and_failed_runs_are_repeated(small, tmp_path, monkeypatch):
    record = rose_exp.run(small, tmp_path)
    path = tmp_path / record["run_id"] / "run.json"
    for status in ("running", "failed"):
        path.write_text(json.dumps(record | {"status": status}))
        done = counted(monkeypatch)
        assert rose_exp.run(small, tmp_path)["metrics"] == record["metrics"]
        assert done == ["pruned"]
        monkeypatch.undo()


def test_folder_of_another_run_is_rejected(small, tmp_path):
    from rose_exp.runs.execution import do_run

    record = rose_exp.run(small, tmp_path)
    other = check_command([*small, "seed=7"]).jobs[0]
    with pytest.raises(RoseExpError, match=f"hydra.run.dir: expected an empty folder .* with run {record['run_id']}"):
        do_run(other.settings, other.config, tmp_path / record["run_id"])
    assert json.loads((tmp_path / record["run_id"] / "run.json").read_text()) == record


def test_concurrent_processes_on_one_run_are_rejected_or_wait(small, tmp_path):
    from rose_exp.runs.execution import do_run

    job = check_command(small).jobs[0]
    with RunFolder(tmp_path).lock.open("w") as other:  # simulates another process
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RoseExpError, match="another process is working on this run"):
            do_run(job.settings, job.config, tmp_path)
        threading.Timer(1, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        assert do_run(job.settings, job.config, tmp_path, wait=True)["status"] == "finished"


def test_sweep_from_python(small, tmp_path):
    overrides = [*small, "method=dense,sparsegpt,rose", "seed=0,1", "sparsity.ratio=0.5,0.6"]
    records = rose_exp.sweep(overrides, tmp_path)
    assert len(records) == 12
    assert len({record["run_id"] for record in records}) == 9  # the dense model is evaluated once
    drawn = {
        (r["config"]["seed"], r["protocol"]["calibration"]["tokens_sha256"]) for r in records if r["protocol"]["calibration"]
    }
    assert len(drawn) == 2  # a seed draws the same windows for every method
    single = rose_exp.run([*small, "method=rose", "seed=1", "sparsity.ratio=0.6"], tmp_path / "alone")
    shared = next(r for r in records if r["run_id"] == single["run_id"])
    assert shared["metrics"] == single["metrics"]  # the sweep shares moments of the first block
    assert [x["error"] for x in shared["layers"]] == [x["error"] for x in single["layers"]]


def test_sweep_from_python_records_failed_jobs(small, tmp_path):
    records = rose_exp.sweep([*small, "calibration.window=64,1024"], tmp_path)
    assert [record["status"] for record in records] == ["finished", "failed"]


def test_run_rejects_overrides_of_several_runs(small, tmp_path):
    with pytest.raises(SettingsError, match="seed: expected one value, got several; rose_exp.sweep runs one job per value"):
        rose_exp.run([*small, "seed=1,2"], tmp_path)


def test_exception_in_one_job_does_not_stop_the_others(small, tmp_path, monkeypatch):
    def broken(_model, tokens, *_, **__):
        raise ZeroDivisionError("a bug") if tokens.shape[1] == 64 else torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(pruning, "prune_model", broken)
    records = rose_exp.sweep([*small, "calibration.window=64,128"], tmp_path)
    first, second = [record["error"] for record in records]
    assert first == "ZeroDivisionError: a bug"
    assert second.startswith("RoseExpError: the run is out of memory: no memory. The estimate for the whole run was ")


@pytest.mark.slow
def test_first_block_key_covers_everything_its_moments_depend_on(small, tmp_path):
    from rose_exp.runs.preparation import first_key

    protocol = rose_exp.run(small, tmp_path)["protocol"]
    key = first_key(check_command(small).jobs[0].settings, protocol)
    for override in ("pipeline.layers=['*.mlp.*']", "pipeline.batch=2", "engine.precision=bf16x2", "model.dtype=float16"):
        assert first_key(check_command([*small, override]).jobs[0].settings, protocol) != key, override
    for name, value in {"threads": 99, "backend": "torch", "device": "cuda: H100", "ranks": 2}.items():
        assert first_key(check_command(small).jobs[0].settings, protocol | {name: value}) != key, name
    calibration = protocol["calibration"] | {"tokens_sha256": "others"}
    assert first_key(check_command(small).jobs[0].settings, protocol | {"calibration": calibration}) != key
    for override in ("sparsity.ratio=0.7", "method=wanda", "engine.damping=0.1"):  # no effect on the inputs
        assert first_key(check_command([*small, override, "reorder=none"]).jobs[0].settings, protocol) == key, override


def stopping_after_a_block(monkeypatch) -> None:
    """Patch runs to receive SIGTERM once they have saved a block."""
    real = RunState.commit

    def commit(self, *arguments, **options):
        real(self, *arguments, **options)
        interruption._stop.signal = "SIGTERM"

    monkeypatch.setattr(RunState, "commit", commit)


def stopped(overrides: list[str], folder: Path, monkeypatch) -> Path:
    """Interrupt a run after its first saved block; return its folder."""
    with monkeypatch.context() as patch:
        stopping_after_a_block(patch)
        with pytest.raises(Interrupted):
            rose_exp.run(overrides, folder)
    (own,) = folder.iterdir()
    assert json.loads((own / "state" / "state.json").read_text())["progress"]["blocks"] == 1
    return own


def test_interrupted_run_resumes_and_starts_over_with_rerun(small, tmp_path, monkeypatch):
    whole = rose_exp.run(small, tmp_path / "whole")
    stopped(small, tmp_path / "resumed", monkeypatch)
    resumed = rose_exp.run(small, tmp_path / "resumed")
    assert resumed["resumed"] == 1
    own = stopped(small, tmp_path / "fresh", monkeypatch)
    (own / "model").mkdir()  # left by an earlier attempt
    fresh = rose_exp.run([*small, "rerun=true"], tmp_path / "fresh")
    assert "resumed" not in fresh
    assert not (own / "state").exists()
    assert not (own / "model").exists()
    assert resumed["metrics"] == fresh["metrics"] == whole["metrics"]


def test_interrupted_rerun_resumes_without_rerun(small, tmp_path, monkeypatch):
    stopped([*small, "rerun=true"], tmp_path, monkeypatch)
    stopped([*small, "rerun=true"], tmp_path, monkeypatch)  # starts over from the first block
    assert rose_exp.run(small, tmp_path)["resumed"] == 1


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("rerun=false", "run the same command again to resume"),
        ("rerun=true", "to resume, run the same command without rerun=true"),
    ],
)
def test_command_prints_how_to_resume(override, hint, small, tmp_path, monkeypatch, capfd):
    stopping_after_a_block(monkeypatch)
    monkeypatch.setattr("sys.argv", ["rose-exp", *small, override, f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == EXIT_STATUS
    assert capfd.readouterr().err.strip().endswith(hint)


def test_files_of_unknown_origin_are_never_deleted(small, tmp_path):
    """A folder without a run record may contain user data."""
    from rose_exp.runs.execution import do_run

    job = check_command([*small, "save=true", "rerun=true"]).jobs[0]
    (tmp_path / "model").mkdir()
    (tmp_path / "state").mkdir()
    with pytest.raises(RoseExpError, match="hydra.run.dir: expected a folder without model"):
        do_run(job.settings, job.config, tmp_path)
    assert (tmp_path / "model").exists()
    assert (tmp_path / "state").exists()


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    """Overrides, run record and folder of a finished 2:4 run."""
    folder = tmp_path_factory.mktemp("finished")
    overrides = [*small_overrides(shared), "sparsity=2:4", "save=true", "figures.study=['*.0.self_attn.[qo]_proj']"]
    record = rose_exp.run(overrides, folder)
    return overrides, record, folder / record["run_id"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("figures.study=['*.0.self_attn.q_proj']", []),  # already studied under a wider pattern
        ("figures.study=['*.0.self_attn.*_proj']", ["figures.study"]),
        ("figures.study=['*.9.*']", ["figures.study"]),  # matches nothing; a new run reports that
        ("figures.draw=false", []),
        ("sparsity_config=true", ["sparsity_config"]),
        ("save=false", []),
        ("tracking=csv", []),
        ("tags=[a]", []),
        ("preflight=false", []),
        ("pipeline.weights=disk", []),
        ("pipeline.resume=recompute", []),
        ("device=cpu", []),
    ],
)
def test_missing_outputs_of_a_finished_run(finished, override, expected):
    overrides, record, folder = finished
    job = check_command([*overrides, override]).jobs[0]
    assert job.run_id == record["run_id"]
    assert lacking(job.settings, record, folder) == expected


def test_plan_lists_finished_runs_with_missing_outputs_as_to_run(finished):
    overrides, _, folder = finished
    overrides = [*overrides, f"hydra.run.dir={folder}"]
    assert "finished already" in format_plan(check_command(overrides).jobs, None)
    assert "to run" in format_plan(check_command([*overrides, "sparsity_config=true"]).jobs, None)
    assert "to run" in format_plan(check_command([*overrides, "rerun=true"]).jobs, None)


def test_deleted_model_counts_as_a_missing_output(finished, tmp_path):
    overrides, record, _ = finished
    assert "save" in lacking(check_command(overrides).jobs[0].settings, record, tmp_path)


@pytest.mark.parametrize(
    ("protocol", "cuda", "expected"),
    [
        ({"device": "cpu: x", "speed": {"not_measured": "expected a CUDA device"}}, False, []),
        ({"device": "cpu: x", "speed": {"not_measured": "expected a CUDA device"}}, True, ["evaluation.speed"]),
        ({"device": "cuda: H100", "speed": {"not_measured": "expected model.dtype float16"}}, True, []),
        ({"device": "cuda: H100", "speed": {"not_measured": None}}, True, []),
        ({"device": "cuda: H100"}, True, ["evaluation.speed"]),
    ],
)
def test_unmeasured_speed_is_missing_where_it_can_be_measured(finished, protocol, cuda, expected, monkeypatch):
    overrides, record, folder = finished
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    settings = check_command([*overrides, "evaluation=[local,speed]"]).jobs[0].settings
    assert lacking(settings, record | {"protocol": record["protocol"] | protocol}, folder) == expected


@pytest.mark.parametrize(
    ("drawn", "sheet", "wanted", "draw", "expected"),
    [
        (True, 6, 6, True, []),
        (True, 6, 4, True, []),
        (True, 6, 8, True, ["evaluation.images.sheet"]),
        (True, 32, 50, True, []),  # only 32 prompts exist
        (False, 6, 6, True, ["evaluation.images.sheet"]),
        (False, 6, 6, False, []),
        (False, 6, 0, True, []),
    ],
)
def test_contact_sheet_with_too_few_prompts_is_missing(drawn, sheet, wanted, draw, expected, tmp_path):
    job = check_command(["model=small-sd3", f"evaluation.images.sheet={wanted}", f"figures.draw={draw}"]).jobs[0]
    config = copy.deepcopy(job.config)
    config["evaluation"]["images"]["sheet"], config["figures"]["draw"] = sheet, drawn
    record = {"config": config, "layers": [], "protocol": {}}
    if drawn:
        (tmp_path / "figures").mkdir()
        (tmp_path / "figures" / "contact_sheet.png").touch()
    assert lacking(job.settings, record, tmp_path) == expected


def test_finished_run_is_reported_to_a_tracker_once(small, tmp_path, monkeypatch):
    done = counted(monkeypatch)
    first = rose_exp.run(small, tmp_path)
    record = rose_exp.run([*small, "tracking=csv"], tmp_path)
    folder = tmp_path / first["run_id"]
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer["name"] for layer in first["layers"]]
    assert f"perplexity.local,{first['metrics']['perplexity.local']}" in (folder / "metrics.csv").read_text().splitlines()
    assert record["tracking"] == [{"kind": "csv", "failure": None}]
    assert json.loads((folder / "run.json").read_text()) == record
    assert record["metrics"] == first["metrics"]
    (folder / "metrics.csv").write_text("mine")
    assert rose_exp.run([*small, "tracking=csv"], tmp_path) == record
    assert (folder / "metrics.csv").read_text() == "mine"  # not reported again
    (folder / "layers.csv").unlink()
    rose_exp.run([*small, "tracking=csv"], tmp_path)
    assert (folder / "layers.csv").exists()
    assert len(done) == 1


def test_finished_run_is_reported_once_to_each_of_several_trackers(small, tmp_path, monkeypatch, caplog):
    done = counted(monkeypatch)
    caplog.set_level(logging.INFO)
    for tracking in ("csv", "tensorboard", "[csv,wandb]", "csv", "none", "[tensorboard,csv,wandb]"):
        record = rose_exp.run([*small, f"tracking={tracking}"], tmp_path)
    assert [place["kind"] for place in record["tracked"]] == ["csv", "tensorboard", "wandb"]
    assert caplog.text.count("logging the results of the finished run to") == 2
    assert "finished run to wandb, without" in caplog.text  # csv has them
    assert [entry["kind"] for entry in record["tracking"]] == ["csv", "tensorboard", "wandb"]
    rose_exp.run([*small, "tracking=wandb", "tracking.wandb.project=other"], tmp_path)
    assert len(list((tmp_path / record["run_id"] / "wandb").glob("offline-run-*"))) == 2
    assert len(done) == 1


def test_records_of_earlier_versions_are_reused(small, tmp_path, monkeypatch):
    """They have one tracker, and its settings directly in ``tracking``."""
    done = counted(monkeypatch)
    record = rose_exp.run([*small, "tracking=csv"], tmp_path)
    path = tmp_path / record["run_id"] / "run.json"
    earlier = {"tracking": {"kind": "csv", "failure": None}, "tracked": [{"kind": "csv"}]}
    old = record | earlier | {"config": record["config"] | {"tracking": {"kind": "csv"}}}
    path.write_text(json.dumps(old))
    assert rose_exp.run([*small, "tracking=csv"], tmp_path)["tracking"] == earlier["tracking"]
    both = rose_exp.run([*small, "tracking=[csv,tensorboard]"], tmp_path)
    assert both["tracking"] == [{"kind": kind, "failure": None} for kind in ("csv", "tensorboard")]
    assert both["tracked"] == [{"kind": "csv"}, {"kind": "tensorboard"}]
    assert conditions(old, "perplexity.local", "sparsity") == conditions(both, "perplexity.local", "sparsity")
    assert len(done) == 1


def test_damaged_record_of_a_finished_run_is_an_error_with_a_remedy(small, tmp_path, monkeypatch):
    done = counted(monkeypatch)
    record = rose_exp.run(small, tmp_path)
    path = tmp_path / record["run_id"] / "run.json"
    del record["layers"][0]["name"]
    for content in ("", "{", json.dumps(record), json.dumps(record | {"layers": 1}), json.dumps(record | {"config": {}})):
        path.write_text(content)
        for options in ([], ["tracking=csv"], ["rerun=true"]):
            with pytest.raises(RoseExpError, match="delete this file or its folder to run the run again"):
                rose_exp.run([*small, *options], tmp_path)
        assert path.read_text() == content
    path.unlink()
    rose_exp.run(small, tmp_path)
    assert len(done) == 2


def test_missing_figures_are_drawn_from_the_run_record(small, tmp_path, monkeypatch):
    done = counted(monkeypatch)
    study = "figures.study=['*.0.self_attn.o_proj']"
    record = rose_exp.run([*small, study, "figures.draw=false"], tmp_path)
    folder = tmp_path / record["run_id"] / "figures"
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    rose_exp.run(small, tmp_path)
    assert {"layers.png", "model.layers.0.self_attn.o_proj.orders.png"} <= {path.name for path in folder.iterdir()}
    assert len(done) == 1
