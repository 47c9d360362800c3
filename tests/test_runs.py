"""A run is done once, from Python or from a sweep, and never by two processes at a time."""

from __future__ import annotations

import fcntl
import json
import threading

import pytest
import torch

import rose_exp
from rose_exp import experiment
from rose_exp.errors import RoseExpError, SettingsError
from rose_exp.runs import LOCK


def counted(monkeypatch) -> list[str]:
    """Labels of the runs that were really done."""
    done = []
    real = experiment.prune_model
    monkeypatch.setattr(experiment, "prune_model", lambda *a, **k: done.append("pruned") or real(*a, **k))
    return done


def test_a_finished_run_is_reused(small, tmp_path, monkeypatch):
    done = counted(monkeypatch)
    first = rose_exp.run([*small, "method=rose"], tmp_path)
    assert (tmp_path / first["run_id"] / "run.json").exists()
    assert rose_exp.run([*small, "method=rose", "device=cpu", "tags=[again]"], tmp_path) == first
    assert len(done) == 1
    again = rose_exp.run([*small, "method=rose", "rerun=true"], tmp_path)
    assert len(done) == 2
    assert again["metrics"] == first["metrics"]
    assert again["started"] > first["started"]


def test_what_was_not_made_is_made(small, tmp_path, monkeypatch):
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
    assert (folder / "model" / "model.safetensors").exists()  # what was saved stays


def test_one_that_was_cut_off_or_failed_is_done_again(small, tmp_path, monkeypatch):
    record = rose_exp.run(small, tmp_path)
    path = tmp_path / record["run_id"] / "run.json"
    for status in ("running", "failed"):
        path.write_text(json.dumps(record | {"status": status}))
        done = counted(monkeypatch)
        assert rose_exp.run(small, tmp_path)["metrics"] == record["metrics"]
        assert done == ["pruned"]
        monkeypatch.undo()


def test_a_folder_with_another_run_is_refused(small, tmp_path):
    from rose_exp.command import check_command
    from rose_exp.runs import do_run

    record = rose_exp.run(small, tmp_path)
    other = check_command([*small, "seed=7"]).jobs[0]
    with pytest.raises(RoseExpError, match=f"hydra.run.dir: expected an empty folder .* with run {record['run_id']}"):
        do_run(other.settings, other.config, tmp_path / record["run_id"])
    assert json.loads((tmp_path / record["run_id"] / "run.json").read_text()) == record


def test_two_at_one_run_are_told_apart(small, tmp_path):
    from rose_exp.command import check_command
    from rose_exp.runs import do_run

    job = check_command(small).jobs[0]
    with (tmp_path / LOCK).open("w") as other:  # as another process would
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RoseExpError, match="another process is at this run"):
            do_run(job.settings, job.config, tmp_path)
        threading.Timer(1, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        assert do_run(job.settings, job.config, tmp_path, wait=True)["status"] == "finished"


def test_a_sweep_from_python(small, tmp_path):
    overrides = [*small, "method=dense,sparsegpt,rose", "seed=0,1", "sparsity.ratio=0.5,0.6"]
    records = rose_exp.sweep(overrides, tmp_path)
    assert len(records) == 12
    assert len({record["run_id"] for record in records}) == 9  # a dense model is measured once
    drawn = {
        (r["config"]["seed"], r["protocol"]["calibration"]["tokens_sha256"]) for r in records if r["protocol"]["calibration"]
    }
    assert len(drawn) == 2  # a seed draws the same windows for every method
    single = rose_exp.run([*small, "method=rose", "seed=1", "sparsity.ratio=0.6"], tmp_path / "alone")
    shared = next(r for r in records if r["run_id"] == single["run_id"])
    assert shared["metrics"] == single["metrics"]  # moments of the first block were shared in the sweep, and not alone
    assert [x["error"] for x in shared["layers"]] == [x["error"] for x in single["layers"]]


def test_a_failed_job_of_a_sweep_from_python_is_told(small, tmp_path):
    records = rose_exp.sweep([*small, "calibration.window=64,1024"], tmp_path)
    assert [record["status"] for record in records] == ["finished", "failed"]


def test_several_runs_are_no_single_one(small, tmp_path):
    with pytest.raises(SettingsError, match="expected those of one run, got those of 2"):
        rose_exp.run([*small, "seed=1,2"], tmp_path)


def test_a_bug_in_one_job_does_not_end_the_others(small, tmp_path, monkeypatch):
    def broken(_model, tokens, *_, **__):
        raise ZeroDivisionError("a bug") if tokens.shape[1] == 64 else torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(experiment, "prune_model", broken)
    records = rose_exp.sweep([*small, "calibration.window=64,128"], tmp_path)
    assert [record["error"] for record in records] == ["ZeroDivisionError: a bug", "OutOfMemoryError: no memory"]


def test_all_that_the_first_blocks_moments_hang_on_is_in_their_key(small, tmp_path):
    from rose_exp.command import check_command
    from rose_exp.preparation import first_key

    protocol = rose_exp.run(small, tmp_path)["protocol"]
    key = first_key(check_command(small).jobs[0].settings, protocol)
    for override in ("pipeline.layers=['*.mlp.*']", "pipeline.batch=2", "engine.precision=bf16x2", "model.dtype=float16"):
        assert first_key(check_command([*small, override]).jobs[0].settings, protocol) != key, override
    for name, value in {"threads": 99, "backend": "torch", "device": "cuda: H100", "ranks": 2}.items():
        assert first_key(check_command(small).jobs[0].settings, protocol | {name: value}) != key, name
    calibration = protocol["calibration"] | {"tokens_sha256": "others"}
    assert first_key(check_command(small).jobs[0].settings, protocol | {"calibration": calibration}) != key
    for override in ("sparsity.ratio=0.7", "method=wanda", "engine.damping=0.1"):  # these change nothing about the inputs
        assert first_key(check_command([*small, override, "reorder=none"]).jobs[0].settings, protocol) == key, override
