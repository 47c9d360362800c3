"""Several processes that start the same command at once, with one output folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROCESSES = 3
COMMANDS = {
    "run": [],
    "sweep": ["-m", "seed=0,1", "method=wanda,sparsegpt"],
    "search": [
        "-m",
        "hydra/sweeper=optuna",
        "method=rose",
        "hydra.sweeper.metric=perplexity.local",
        "hydra.sweeper.n_trials=3",
    ],
}

pytestmark = pytest.mark.slow


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "rose_exp", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def perplexities(folder: Path) -> dict[str, float]:
    records = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("outputs/*/run.json")}
    assert all(record["status"] == "finished" for record in records.values())
    return {name: record["metrics"]["perplexity.local"] for name, record in records.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_processes_share_an_output_folder(name, small, tmp_path):
    arguments = [*COMMANDS[name], *small, "figures.draw=false", "pipeline.layers=['*.0.mlp.*']"]
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    shared.mkdir()
    alone.mkdir()
    assert start(arguments, alone).wait(timeout=300) == 0
    for _ in range(2):  # the second time, everything is finished
        processes = [start(arguments, shared) for _ in range(PROCESSES)]
        outputs = [process.communicate(timeout=300) for process in processes]
        statuses = [process.returncode for process in processes]
        for status, (output, errors) in zip(statuses, outputs, strict=True):
            assert "Traceback" not in output + errors, errors
            assert status == 0 or "another process is working on" in output + errors, errors
        assert 0 in statuses
        assert name != "sweep" or set(statuses) == {0}
    assert perplexities(shared) == perplexities(alone)
    left = [path for path in shared.rglob("*") if path.name.startswith(".run.json-") or path.name in ("state", "model")]
    assert left == []
