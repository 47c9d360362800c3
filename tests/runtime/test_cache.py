"""The cache of derived data: entries are complete or absent, checked, shared by processes and bounded in size."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rose_exp.runtime import cache
from rose_exp.runtime.cache import DERIVED, FACTS, cached
from rose_exp.runtime.errors import RoseExpError

from ..conftest import REPOSITORY


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROSE_EXP_CACHE_GB", raising=False)
    yield
    release()


def release() -> None:
    """Stop using all entries, as at the end of the process."""
    for entry in list(cache._in_use):
        cache._unlock(entry)


def entries(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / DERIVED).iterdir() if not path.name.startswith("."))


class Fill:
    """Writes files and counts its calls."""

    def __init__(self, size: int = 100):
        self.size, self.calls = size, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "a.bin").write_bytes(b"a" * self.size)
        (folder / "inner").mkdir()
        (folder / "inner/b.txt").write_text("b")


def test_entry_is_filled_once_for_each_key():
    fill = Fill()
    keys = [{"file": "1"}, {"file": "2"}, {"file": "1", "version": None}]
    found = {cached(kind, key, fill) for key in keys for kind in ("text", "weights") for _ in range(3)}
    assert fill.calls == len(found) == 6
    assert all((path / "inner/b.txt").read_text() == "b" for path in found)


@pytest.mark.parametrize("name", ["a.bin", "inner/b.txt", FACTS])
@pytest.mark.parametrize("damage", ["removed", "truncated", "changed"])
def test_damaged_entry_is_created_again(name, damage, caplog):
    fill = Fill()
    path = cached("data", {"n": 1}, fill) / name
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"?" if damage == "changed" else b""))
    entry = cached("data", {"n": 1}, fill)
    assert fill.calls == 2
    assert (entry / "a.bin").read_bytes() == b"a" * 100
    assert "damaged" in caplog.text or (name, damage) == (FACTS, "removed")


def test_errors_leave_no_entry(tmp_path, caplog):
    def refuse(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RoseExpError("the file is damaged")

    def full(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RoseExpError, match="the file is damaged"):
        cached("data", {}, refuse)
    assert cached("data", {}, full) is None
    assert "cannot use the cache" in caplog.text
    assert "No space left on device" in caplog.text
    assert entries(tmp_path) == []
    assert cached("data", {}, Fill()) is not None


def test_unwritable_cache_is_not_used(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "file"))
    assert cached("data", {}, Fill()) is None
    assert "cannot use the cache" in caplog.text


@pytest.mark.parametrize("value", ["0", "0.0"])
def test_limit_of_zero_disables_the_cache(value, tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", value)
    assert cached("data", {}, Fill()) is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("value", ["-1", "20GB", "nan", "inf"])
def test_invalid_limit_is_rejected(value, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", value)
    with pytest.raises(RoseExpError, match=f"ROSE_EXP_CACHE_GB: expected a number of GB of at least 0, got '{value}'"):
        cached("data", {}, Fill())


def test_least_recently_used_entries_are_removed(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", "0.0000045")  # 4500 bytes: three entries of 1000 bytes and their facts
    for number in range(3):
        entry = cached("data", {"n": number}, Fill(1000))
        os.utime(entry / FACTS, (time.time() - 100 + number,) * 2)
    release()
    assert len(entries(tmp_path)) == 3
    cached("data", {"n": 0}, Fill(1000))  # used again: now the most recent one
    release()
    cached("data", {"n": 3}, Fill(1000))
    assert len(entries(tmp_path)) == 3
    assert "exceeds its limit" in caplog.text
    fill = Fill(1000)
    for number in (0, 2, 3):
        cached("data", {"n": number}, fill)
    assert fill.calls == 0


def test_entry_that_is_too_large_is_not_created(monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", "0.001")
    fill = Fill()
    assert cached("data", {}, fill, size=600_000) is None
    assert cached("data", {}, fill, size=400_000) is not None
    assert fill.calls == 1


def process(code: str) -> subprocess.Popen:
    body = "from pathlib import Path\nfrom rose_exp.runtime.cache import cached\n" + textwrap.dedent(code)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", body], env=environment, text=True, **pipes)


def test_entry_in_use_by_another_process_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", "0.0000015")  # one entry and its facts
    user = process(
        """
        entry = cached("data", {"n": "used"}, lambda folder: (folder / "a.bin").write_bytes(b"a" * 600))
        print("ready", flush=True)
        input()
        print((entry / "a.bin").stat().st_size)
        """
    )
    assert user.stdout.readline() == "ready\n"
    for number in range(3):
        cached("data", {"n": number}, Fill(600))
        release()
    output, errors = user.communicate("\n", timeout=60)
    assert output == "600\n", errors
    assert len(entries(tmp_path)) == 2  # the one in use, and the last one
    cached("data", {"n": 3}, Fill(600))
    assert len(entries(tmp_path)) == 1


def test_processes_fill_an_entry_once(tmp_path):
    code = """
    import time
    def fill(folder):
        with open("fills", "a") as file:
            file.write("x")
        (folder / "a.bin").write_bytes(b"a" * 100)
        time.sleep(0.5)
    print(cached("data", {}, fill) / "a.bin")
    """
    code = f"import os\nos.chdir({str(tmp_path)!r})\n" + textwrap.dedent(code)
    processes = [process(code) for _ in range(4)]
    results = [one.communicate(timeout=60) for one in processes]
    assert len({output for output, _ in results}) == 1, results
    assert Path(results[0][0].strip()).stat().st_size == 100
    assert (tmp_path / "fills").read_text() == "x"
