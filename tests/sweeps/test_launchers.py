"""Sweeps with the real joblib, Slurm and Ray launchers, compared with the same jobs run sequentially."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rose_exp.report import collect_records

from ..conftest import REPOSITORY, small_overrides

SLURM_NODE = REPOSITORY / "scripts" / "slurm_node.sh"
SKIPPED = 77  # exit status of the script if Slurm is unavailable
JOBS = ["method=sparsegpt,rose", "seed=0", "calibration.window=128,1024"]  # the last window exceeds the maximum sequence length

pytestmark = pytest.mark.slow


def sweep(small, folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rose_exp", "-m", *small, *JOBS, f"hydra.sweep.dir={folder}", *overrides]
    return subprocess.run(
        command, cwd=folder.parent, capture_output=True, text=True, timeout=240, check=False, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def expected(shared, tmp_path_factory):
    """Perplexities of the jobs that succeed."""
    import rose_exp

    folder = tmp_path_factory.mktemp("expected")
    records = [rose_exp.run([*small_overrides(shared), f"method={method}"], folder) for method in ("sparsegpt", "rose")]
    return {record["label"]: record["metrics"]["perplexity.local"] for record in records}


def check(done: subprocess.CompletedProcess, folder: Path, expected) -> None:
    assert "2 ran, 2 failed, of 4 jobs" in done.stdout, done.stderr[-3000:] + done.stdout[-2000:]
    assert done.returncode == 1
    records = [record for _, record in collect_records(folder)]
    assert sorted(record["status"] for record in records) == ["failed", "failed", "finished", "finished"]
    found = {r["label"]: r["metrics"]["perplexity.local"] for r in records if r["status"] == "finished"}
    assert found == pytest.approx(expected, rel=0.02)  # workers use fewer threads, which changes rounding


def test_joblib_with_a_pool_of_devices(small, tmp_path, expected):
    folder = tmp_path / "out"
    done = sweep(small, folder, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "device=[cpu,cpu]")
    check(done, folder, expected)
    again = sweep(small, folder, "hydra/launcher=joblib", "device=[cpu,cpu]")
    assert "2 reused, 2 failed, of 4 jobs" in again.stdout  # failed jobs are retried, finished jobs are not


def test_ray_on_a_local_cluster(small, tmp_path, expected):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray: pip install rose_exp[ray]")
    folder = tmp_path / "out"
    equal = {"RAY_worker_niceness": "0"}  # with Ray's default of 15, parallel tests starve its workers
    done = sweep(small, folder, "hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2", "device=cpu", **equal)
    check(done, folder, expected)


@pytest.fixture
def slurm():
    """Environment variables of a real single-node Slurm cluster."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets need a short path
    try:
        started = subprocess.run(
            [SLURM_NODE, "start", folder], capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL
        )
        if started.returncode == SKIPPED:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        yield dict(shlex.split(line)[1].split("=", 1) for line in started.stdout.splitlines())
    finally:
        subprocess.run([SLURM_NODE, "stop", folder], timeout=60, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def test_slurm_on_a_single_node(small, tmp_path, expected, slurm):
    folder = tmp_path / "out"
    options = ["partition=debug", "cpus_per_task=1", "mem_gb=2", "timeout_min=5", "gpus_per_node=null"]
    done = sweep(small, folder, "hydra/launcher=submitit_slurm", *(f"hydra.launcher.{option}" for option in options), **slurm)
    check(done, folder, expected)
