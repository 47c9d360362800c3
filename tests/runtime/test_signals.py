"""Resuming after a signal: the resumed run ends with the same weights and run record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rose_exp import run
from rose_exp.runs import language as experiment
from rose_exp.runtime.signals import EXIT_STATUS, Interrupted

from ..cli.test_app import rose_exp as command
from ..conftest import small_overrides

LONGER = ["calibration.samples=96", "calibration.window=256", "save=true", "figures.draw=false", "hydra.run.dir=out"]


def started(overrides: list[str], folder: Path, blocks: int) -> subprocess.Popen:
    """Start the command as a process and wait until it has saved ``blocks`` blocks."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rose_exp", *overrides],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    )
    state, end = folder / "out" / "state" / "state.json", time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if state.exists() and json.loads(state.read_text())["progress"]["blocks"] >= blocks:
            return process
        time.sleep(0.002)
    raise AssertionError(f"the run did not save {blocks} blocks: {process.communicate()}")


def untimed(record: dict) -> dict:
    record = json.loads(json.dumps(record))
    for name in ("started", "ended", "seconds", "peak_memory_bytes", "peak_disk_bytes", "estimate", "resumed"):
        record.pop(name, None)
    for layer in record["layers"]:
        layer.pop("seconds")
    return record


@pytest.fixture(scope="module")
def uninterrupted(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    overrides = [*small_overrides(shared), *LONGER]
    done = command(*overrides, folder=folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "out" / "state").exists()  # removed when the run has finished
    return overrides, folder / "out"


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow), (signal.SIGTERM, EXIT_STATUS)]
)
def test_run_resumed_after_a_signal_matches_an_uninterrupted_run(uninterrupted, tmp_path, number, status):
    overrides, whole = uninterrupted
    process = started(overrides, tmp_path, 1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == ("running" if number == signal.SIGKILL else "interrupted")
    assert number == signal.SIGKILL or "run the same command again to resume" in errors
    assert not (tmp_path / "out" / "model").exists()
    done = command(*overrides, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["resumed"] >= 1
    assert untimed(record) == untimed(json.loads((whole / "run.json").read_text()))
    own, expected = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "out", whole))
    assert own.keys() == expected.keys()
    assert all((own[name] == expected[name]).all() for name in own)


def test_zero_shot_evaluation_stops_on_a_signal(small, shared, tmp_path, monkeypatch):
    def signaled(model, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        model(torch.zeros(1, 4, dtype=torch.int64))
        raise AssertionError("the model ran after the signal")

    monkeypatch.setattr(experiment, "measure_zero_shot", signaled)
    tasks = ["evaluation.zero_shot.tasks=[winogrande]", f"evaluation.zero_shot.data_dir={shared}/data/zeroshot"]
    with pytest.raises(Interrupted, match="SIGTERM"):
        run([*small, "evaluation=[local,zero_shot]", *tasks], tmp_path)
    record = json.loads(next(tmp_path.glob("*/run.json")).read_text())
    assert record["status"] == "interrupted"
    assert record["metrics"]["perplexity.local"] > 0
