"""Commands of the README: all are validated; those that work offline also run with small settings."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from rose_exp.cli.command import check_command

from .conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:rose-exp|bash) .*$", "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
PRUNING = [command for command in COMMANDS if command.startswith("rose-exp ")]
SMALL_IMAGES = ["calibration.samples=2", "evaluation.images.samples=2", "diffusion.steps=2"]
SMALL = [
    "calibration.samples=2",
    "calibration.window=64",
    "evaluation.perplexity.embedded.windows=2",
    "pipeline.layers=['*.0.*']",
]


def test_readme_contains_the_expected_commands():
    assert [command.split("#")[0].strip() for command in COMMANDS[:2]] == ["bash scripts/demo.sh", "bash scripts/test.sh"]
    assert len(PRUNING) == 14


@pytest.mark.parametrize("command", PRUNING)
def test_every_command_is_valid(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FILE").write_text("text")
    check_command(shlex.split(command)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in PRUNING if not re.search("llama|local|sd3-medium| -m ", c)])
def test_offline_commands_run(command, tmp_path):
    images = "model=small-" in command
    arguments = [*shlex.split(command)[1:], *(SMALL_IMAGES if images else SMALL)]
    done = subprocess.run(
        [sys.executable, "-m", "rose_exp", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("images.psnr" if images else "perplexity.embedded") in done.stdout


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "reproduce.sh", "gpu_check.sh", "slurm_node.sh", "_venv.sh"])
def test_scripts_parse_and_are_executable(script):
    path = REPOSITORY / "scripts" / script
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert script.startswith("_") or os.access(path, os.X_OK)


def test_readme_mentions_every_config_choice():
    for path in (REPOSITORY / "conf").glob("*/*.yaml"):
        if path.parent.name not in ("engine", "experiment") and not path.stem.startswith("_"):
            assert f"`{path.stem}`" in README, path
