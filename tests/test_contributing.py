"""Examples of CONTRIBUTING.md: its files are created and its commands run in a copy of the checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from .conftest import REPOSITORY

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\S+)`:\n\n```(?:python|yaml)\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Copy of the checkout with the example files."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("rose_exp", "conf", "tests"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in FILES.items():
        assert not (copy / name).exists(), name
        (copy / name).write_text(content, encoding="utf-8")
    return copy


def run(*command: str, checkout, folder) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_examples_cover_every_kind_of_extension():
    folders = {name.rpartition("/")[0] for name in FILES}
    assert folders == {
        "rose_exp/engine/methods", "conf/method", "tests/engine", "rose_exp/engine/scores", "conf/reorder", "conf/model",
        "conf/calibration",
    }  # fmt: skip
    assert len(COMMANDS) == 4


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_example_commands_run(command, checkout, small, shared, tmp_path):
    """Uses the small model and texts unless the command sets others; file paths are relative to the shared data."""
    program, *own = shlex.split(command)
    assert program == "rose-exp"
    groups = {override.partition("=")[0] for override in own}
    kept = [o for o in small if o.partition("=")[0].partition(".")[0] not in groups]
    done = run("rose_exp", *kept, *own, f"hydra.run.dir={tmp_path}/out", checkout=checkout, folder=shared / "data")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["sparsity"] == 0.5
    if "method=random" in own:
        assert record["label"] == "Random"
    if "reorder=activation" in own:
        assert all(layer["reordered"] for layer in record["layers"] if layer["columns"] > 128)


def test_example_test_passes(checkout):
    done = run("pytest", "-q", "tests/engine/test_random.py", checkout=checkout, folder=checkout)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
