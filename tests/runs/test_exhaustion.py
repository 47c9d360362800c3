"""Exhausted memory is one clear error, whichever library reports it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from rose_exp.runs.exhaustion import explained, is_exhaustion
from rose_exp.runtime.errors import RoseExpError

from ..conftest import REPOSITORY

EXHAUSTED = [
    MemoryError(),
    MemoryError("Unable to allocate 3.2 GiB for an array"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 4 bytes"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libgomp.so: failed to map segment from shared object"),
]
OTHERS = [
    ValueError("out of memory"),  # the text of a user
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ZeroDivisionError("a bug"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", EXHAUSTED, ids=repr)
def test_errors_of_exhausted_memory_become_one_clear_error(error):
    estimate = {"host": 3 * 2**30, "device": None, "disk": 0}
    with pytest.raises(RoseExpError, match=r"the run is out of memory: .* estimate for the whole run was 3\.0 GiB"):
        _raise_explained(error, {"estimate": estimate})
    with pytest.raises(RoseExpError, match="the run is out of memory"):
        _raise_explained(error, {})


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught:
        _raise_explained(error, {})
    assert caught.value is error


def test_error_raised_from_exhausted_memory_counts():
    error = SafetensorError("cannot read")
    error.__cause__ = MemoryError()
    assert is_exhaustion(error)
    error.__cause__ = error  # a cycle
    assert not is_exhaustion(error)


def _raise_explained(error: BaseException, record: dict) -> None:
    with explained(record):
        raise error


@pytest.mark.parametrize("limit", ["RLIMIT_DATA", "RLIMIT_AS"])
@pytest.mark.parametrize("preflight", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_run_under_a_limit_ends_with_one_error(limit, preflight, small, tmp_path):
    """The hidden states need 656 MB, of which the process may use 150 MB."""
    overrides = [*small, "calibration.samples=20000", f"preflight={preflight}", f"hydra.run.dir={tmp_path}", "method=wanda"]
    code = (
        "import resource, psutil, sys; from rose_exp.cli import app; from rose_exp.runs import execution, language;"
        "used = psutil.Process().memory_info();"
        f"limit = (used.data if {limit!r} == 'RLIMIT_DATA' else used.vms) + 400 * 2**20;"
        f"resource.setrlimit(resource.{limit}, (limit, limit));"
        f"sys.argv = ['rose-exp', *{overrides!r}]; app.main()"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "Traceback" not in output
    expected = "does not fit (host)" if preflight == "true" else "the run is out of memory"
    assert output.count(expected) == 1
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "failed"
    assert expected in record["error"]
    assert not list(tmp_path.rglob(".rose_exp-*"))
