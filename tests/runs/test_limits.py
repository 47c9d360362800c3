"""Available memory: limits of control groups and of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rose_exp.runs.limits import UNLIMITED, available, control_groups

GIB = 2**30


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def own_group(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_limits_of_version_2_of_all_parent_groups(tmp_path):
    root = tmp_path / "fs"
    stat = "anon 1\nfile 100\ninactive_file 7"
    write(root / "a", memory__max=5000, memory__high=4000, memory__current=1000, memory__stat=stat)
    write(root / "a" / "job", memory__max="max", memory__high="max", memory__current=900, memory__stat="file 0")
    write(root, cgroup__controllers="memory")  # the root has no limits
    assert list(control_groups(root, own_group(tmp_path, "0::/a/job"))) == [4100, 3100]


def test_limits_of_version_1(tmp_path):
    root = tmp_path / "fs"
    stat = "cache 3\ntotal_cache 300"
    write(root / "memory" / "job", memory__limit_in_bytes=2000, memory__usage_in_bytes=500, memory__stat=stat)
    write(root / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=500, memory__stat=stat)
    lines = ("12:cpu,cpuacct:/other", "4:memory:/job", "0::/unified")
    assert UNLIMITED < 2**63 - 4096
    assert list(control_groups(root, own_group(tmp_path, *lines))) == [1800]


def test_group_of_a_container_whose_path_lies_outside_of_it(tmp_path):
    root = tmp_path / "fs"
    write(root, memory__max=3000, memory__current=1000, memory__stat="file 0")
    assert list(control_groups(root, own_group(tmp_path, "0::/docker/123"))) == [2000]


def test_exceeded_limits_leave_nothing(tmp_path):
    write(tmp_path / "fs", memory__max=1000, memory__high=500, memory__current=2000, memory__stat="file 100")
    assert list(control_groups(tmp_path / "fs", own_group(tmp_path, "0::/"))) == [0, 0]


def test_system_without_control_groups(tmp_path):
    assert list(control_groups(tmp_path, tmp_path / "missing")) == []


@pytest.mark.parametrize("limit", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_available_memory_respects_process_limits(limit, tmp_path):
    code = (
        "import resource, torch, psutil; from pathlib import Path; from rose_exp.runs.limits import available;"
        "used = psutil.Process().memory_info();"
        f"used = used.data if {limit!r} == 'RLIMIT_DATA' else used.vms;"
        f"resource.setrlimit(resource.{limit}, (used + 2**30, used + 2**30));"
        f"free = [available(Path({str(tmp_path)!r}), torch.device('cpu'), mapped).host for mapped in (0, 2**28, 2**40)];"
        "print(*free, psutil.Process().memory_info().rss)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    free, beside_a_file, beside_a_large_file, used = map(int, output.split())
    assert 0.7 * GIB < free - used < GIB
    assert free - beside_a_file == pytest.approx(2**28, abs=2**24)
    assert beside_a_large_file == 0
    assert available(tmp_path, torch.device("cpu"), 2**60).host > 0  # without a limit on the process, files do not count
