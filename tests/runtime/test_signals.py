"""The command is killed and given again: it goes on, and ends with the same weights and record."""

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
    """The command as a process that has kept so many blocks."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rose_exp", *overrides],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )
    state, end = folder / "out" / "state" / "state.json", time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if state.exists() and json.loads(state.read_text())["progress"]["blocks"] >= blocks:
            return process
        time.sleep(0.002)
    raise AssertionError(f"the run was not seen with {blocks} blocks kept: {process.communicate()}")


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
    assert not (folder / "out" / "state").exists()  # of no use any more
    return overrides, folder / "out"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, EXIT_STATUS)])
def test_a_run_goes_on_after_a_signal_and_ends_the_same(uninterrupted, tmp_path, number, status):
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


def test_zero_shot_does_not_outlast_a_signal(small, shared, tmp_path, monkeypatch):
    def asked(model, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        model(torch.zeros(1, 4, dtype=torch.int64))
        raise AssertionError("the model was run all the same")

    monkeypatch.setattr(experiment, "measure_zero_shot", asked)
    tasks = ["evaluation.zero_shot.tasks=[winogrande]", f"evaluation.zero_shot.data_dir={shared}/data/zeroshot"]
    with pytest.raises(Interrupted, match="SIGTERM"):
        run([*small, "evaluation=[local,zero_shot]", *tasks], tmp_path)
    record = json.loads(next(tmp_path.glob("*/run.json")).read_text())
    assert record["status"] == "interrupted"
    assert record["metrics"]["perplexity.local"] > 0
