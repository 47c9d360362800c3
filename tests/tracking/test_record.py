"""Run records: reordered layers and device names."""

from __future__ import annotations

import logging

import pytest
import torch

import rose_exp
from rose_exp.tracking import RunRecord
from rose_exp.tracking.record import device_name


@pytest.mark.parametrize(
    ("moved", "level", "line"),
    [
        ([True, False, True], logging.INFO, "ROSE: 2 of 3 layers reordered"),
        ([False, False], logging.WARNING, "ROSE: 0 of 2 layers reordered; the result equals that of reorder=none"),
    ],
)
def test_reordered_layers_are_counted_and_logged(moved, level, line, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    layers = [{"name": f"layer {i}", "reordered": flag} for i, flag in enumerate(moved)]
    record = RunRecord(tmp_path, {}, "ROSE", "0")
    record.pruned(layers, [], ordered=True)
    assert record.data["metrics"] == {"reordered_layers": sum(moved)}
    assert [(found.levelno, found.message) for found in caplog.records] == [(level, line)]
    caplog.clear()
    other = RunRecord(tmp_path / "other", {}, "SparseGPT", "1")
    other.pruned(layers, [])
    assert other.data["metrics"] == {}
    assert not caplog.records


def test_run_without_reordered_layers_equals_a_run_without_reordering(small, tmp_path):
    def run(*overrides):
        return rose_exp.run([*small, "sparsity.ratio=0.68", "figures.draw=false", *overrides], tmp_path)["metrics"]

    without, rose = run("method=sparsegpt"), run("method=rose")
    assert rose == without | {"reordered_layers": 0}
    always = run("method=rose", "reorder.threshold=null")
    assert always["reordered_layers"] == 35
    assert always["perplexity.local"] != rose["perplexity.local"]


def test_device_name_is_independent_of_the_gpu_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    assert device_name(torch.device("cuda:1")) == device_name(torch.device("cuda")) == "cuda: H100"


def test_device_name_of_a_cpu_contains_the_instructions_that_determine_rounding(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert device_name(torch.device("cpu")) == "cpu: x86_64, AVX512"
