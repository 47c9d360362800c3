"""Device pool: each job, in any process, claims one device for its lifetime."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from rose_exp.sweeps import devices
from rose_exp.sweeps.devices import claimed

HOLD = """
import sys, time
from rose_exp.sweeps.devices import claimed
with claimed(["one", "two", "two"], sweep=True) as device:
    print(device, flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def own_pool(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(devices.tempfile, "tempdir", None)
    monkeypatch.setattr(devices, "PAUSE", 0.05)


def holder(seconds: float) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(seconds)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_devices_are_exclusive_and_released_when_a_process_dies():
    first, name = holder(60)
    second, other = holder(60)
    assert (name, other) == ("one", "two")
    with claimed(["one", "two", "two"], sweep=True) as mine:
        assert mine == "two"  # listed twice, so claimed twice
        first.kill()
        first.wait()
        with claimed(["one"], sweep=True) as freed:
            assert freed == "one"
    second.kill()
    second.wait()


def test_claim_waits_until_a_device_is_free():
    process, _ = holder(1.5)
    start = time.monotonic()
    with claimed(["one"], sweep=True):
        assert time.monotonic() - start > 0.5
    process.wait()


def test_single_device_is_used_without_locking():
    with claimed("cpu", sweep=True) as first, claimed("cpu", sweep=True) as second:
        assert (first, second) == ("cpu", "cpu")
    with claimed("auto", sweep=False) as device:
        assert device == "auto"


def test_auto_selects_any_free_gpu_in_a_sweep(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        devices.torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": f"GPU-{device.index}"})
    )
    with claimed("auto", sweep=True) as first, claimed("auto", sweep=True) as second:
        assert (first, second) == ("cuda:0", "cuda:1")
    with claimed("auto", sweep=False) as alone:
        assert alone == "auto"
