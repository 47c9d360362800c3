"""Inputs of a run's stages."""

from __future__ import annotations

import logging

import pytest
import torch

from rose_exp.runs.preparation import warn_of_slow_dtype


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("machine", ["x86_64", "arm64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_slow_dtypes_of_a_cpu_are_named(device, dtype, machine, supported, monkeypatch, caplog):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    caplog.set_level(logging.WARNING)
    warn_of_slow_dtype(dtype, torch.device(device))
    slow = (device, dtype, machine, supported) == ("cpu", torch.bfloat16, "x86_64", False)
    assert ("no instructions for bfloat16; float32 may be several times as fast" in caplog.text) == slow


def test_older_torch_versions_report_no_dtype(monkeypatch, caplog):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delattr(torch.cpu, "_is_amx_fp16_supported", raising=False)
    warn_of_slow_dtype(torch.float16, torch.device("cpu"))
    assert not caplog.text
