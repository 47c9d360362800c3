"""Configuration files of the user: in conf/ of the working directory, with --config-dir and with hydra.searchpath."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rose_exp
from rose_exp.cli.command import check_command
from rose_exp.cli.paths import config_folder, with_local_files

EXPERIMENT = """# @package _global_
# My own study.
defaults:
  - override /method: mine

seed: 7
"""
METHOD = "# Wanda with another name.\nname: wanda\noptions: {}\nlayer_options: {}\n"


@pytest.fixture(params=["plain", "with space", "it's", "a,b=c"])
def place(request, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / request.param
    for name, text in {"experiment/mine.yaml": EXPERIMENT, "method/mine.yaml": METHOD}.items():
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name).write_text(text)
    monkeypatch.chdir(folder)
    return folder


def command(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-m", "rose_exp", *arguments]
    return subprocess.run(run, cwd=place, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("place")
def test_local_choices_are_composed():
    (job,) = check_command(with_local_files(["experiment=mine"])).jobs
    assert (job.settings.method.name, job.settings.seed) == ("wanda", 7)


def test_a_run_and_the_help_use_local_files(place, small):
    if place.name != "it's":  # one name with a special character suffices for whole commands
        pytest.skip("tested without a process")
    done = command(place, *small, "experiment=mine", "figures.draw=false")
    assert done.returncode == 0, done.stderr
    assert "Wanda" in done.stdout
    swept = command(place, "-m", *small, "method=mine,magnitude", "figures.draw=false")
    assert "2 ran, of 2 jobs" in swept.stdout, swept.stderr
    shown = command(place, "--help").stdout
    assert "My own study." in shown
    assert "Wanda with another name." in shown
    assert "name: wanda" in command(place, "--cfg", "job", "experiment=mine").stdout


def test_local_files_do_not_change_existing_choices(place):
    """A folder conf/ of another project must not change results."""
    (place / "conf/method/rose.yaml").write_text(METHOD)
    (place / "conf/config.yaml").write_text("seed: 3\n")
    (job,) = check_command(with_local_files(["method=rose"])).jobs
    assert (job.settings.label, job.settings.seed) == ("ROSE", 0)


@pytest.mark.parametrize("flag", ["--config-dir", "hydra.searchpath", "--config-path"])
def test_an_explicit_search_path_counts_alone(flag, tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_local_files(["-sc", "install=bash"]) == ["-sc", "install=bash"]
    given = [f"{flag}=[file:///elsewhere]"] if flag.startswith("hydra") else [flag, "elsewhere"]
    assert with_local_files(given) == given


def test_nothing_is_added_without_local_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_local_files(["method=rose"]) == ["method=rose"]
    monkeypatch.chdir(config_folder().parent)
    assert with_local_files(["method=rose"]) == ["method=rose"]


def test_python_uses_local_files_as_the_command_does(tmp_path, monkeypatch, small):
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/mine.yaml").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    assert rose_exp.run([*small, "method=mine", "figures.draw=false"], tmp_path / "outputs")["label"] == "Wanda"


def test_help_lists_the_choices_of_config_dir(tmp_path):
    (tmp_path / "sparsity").mkdir()
    (tmp_path / "sparsity/mine.yaml").write_text("# My sparsity.\npattern: unstructured\nratio: 0.8\n")
    assert "  mine          My sparsity." in command(tmp_path, "--config-dir", str(tmp_path), "--help").stdout
    assert "  mine          My sparsity." in command(tmp_path, f"hydra.searchpath=[file://{tmp_path}]", "--help").stdout
