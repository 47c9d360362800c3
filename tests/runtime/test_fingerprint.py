"""Fingerprint of the code that affects results."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import rose_exp
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.fingerprint import CODE, IRRELEVANT, code_sha256, folder_sha256, model_sha256, weights_sha256

PACKAGE = Path(rose_exp.__file__).parent


def test_fingerprint_covers_every_file_except_those_listed_as_irrelevant(tmp_path):
    copy = tmp_path / "rose_exp"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert code_sha256(copy) == code_sha256()
    files = [path for path in sorted(copy.rglob("*")) if path.suffix in CODE]
    counting = [path for path in files if path.relative_to(copy).parts[0] not in IRRELEVANT]
    packages = {path.relative_to(copy).parts[0] for path in counting if path.parent != copy}
    assert packages == {path.name for path in copy.iterdir() if path.is_dir()} - set(IRRELEVANT)
    assert {f"{name}_prompts.txt" for name in ("calibration", "evaluation", "digit")} <= {path.name for path in counting}
    before = code_sha256(copy)
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert (code_sha256(copy) != before) == (path in counting), path
        path.write_bytes(content)
    (copy / "engine" / "new.py").write_text("")
    assert code_sha256(copy) != before


def test_irrelevant_paths_exist():
    assert [name for name in IRRELEVANT if not (PACKAGE / name).exists()] == []


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "memory.safetensors").symlink_to("/proc/self/mem")
    for fingerprint in (folder_sha256, model_sha256, weights_sha256):
        with pytest.raises(RoseExpError, match=r"^cannot read .*memory\.safetensors: "):
            fingerprint(tmp_path)
