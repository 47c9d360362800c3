"""The GPU checks at tiny sizes on a CPU, and how they report failures."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from .conftest import REPOSITORY, SHARED

sys.path.insert(0, str(REPOSITORY / "scripts"))

import data_sheets
import gpu_check
from gpu_checks import layers, models
from gpu_checks.report import Report, Setup, Skip, run_check

TINY = ["--device", "cpu", "--tiny"]
NAMES = {
    "selection",
    "moments",
    "layers",
    "golden",
    "small_models",
    "command",
    "collectives",
    "activations",
    "diffusion",
    "sparse_speed",
    "layer_speed",
    "model",
}
STATUSES = ("passed", "missed", "failed", "skipped")


def passing(_setup: Setup, report: Report) -> None:
    """Passes."""
    with report.case("one") as facts:
        facts["value"] = 1
    report.target("speedup", 60.0, least=50)


def failing(_setup: Setup, _report: Report) -> None:
    """Raises an error."""
    raise ValueError("a check made to fail")


def failing_case(_setup: Setup, report: Report) -> None:
    """Fails one of two cases."""
    with report.case("wrong"):
        raise AssertionError("arithmetic")
    with report.case("right"):
        pass


def skipping(_setup: Setup, _report: Report) -> None:
    """Cannot run."""
    raise Skip("needs something else")


def missing(_setup: Setup, report: Report) -> None:
    """Misses a target."""
    report.target("engine/roofline", 1.7, most=1.5)


def results_of(tmp_path, monkeypatch, *checks) -> tuple[int, dict]:
    entries = {check.__name__: gpu_check.Entry(check, 10) for check in checks}
    monkeypatch.setattr(gpu_check, "CHECKS", entries)
    file = tmp_path / "results.json"
    status = gpu_check.main([*TINY, "--here", "--json", str(file)])
    return status, json.loads(file.read_text())


def assert_structure(results: dict) -> None:
    assert {"hardware", "device", "tiny", "checks", "seconds"} <= results.keys()
    assert {"device", "torch", "python", "cuda"} <= results["hardware"].keys()
    for entry in results["checks"]:
        assert {"name", "status", "seconds", "details", "cases", "targets"} <= entry.keys()
        assert entry["status"] in STATUSES
        assert ("reason" in entry) == (entry["status"] == "skipped")
        assert ("error" in entry) == ("traceback" in entry)
        assert all({"name", "passed"} <= case.keys() for case in entry["cases"])
        assert all({"name", "value", "least", "most", "met"} == target.keys() for target in entry["targets"])


def test_a_failing_check_is_reported_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    status, results = results_of(tmp_path, monkeypatch, failing, failing_case, passing)
    assert status == 1
    assert_structure(results)
    failed, partly, passed = results["checks"]
    assert failed["status"] == "failed"
    assert "Traceback" in failed["traceback"]
    assert "a check made to fail" in failed["traceback"]
    assert partly["status"] == "failed"
    assert [case["passed"] for case in partly["cases"]] == [False, True]
    assert "arithmetic" in partly["cases"][0]["traceback"]
    assert passed["status"] == "passed"
    assert passed["cases"] == [{"name": "one", "passed": True, "value": 1}]
    printed = capsys.readouterr().out
    assert "ValueError: a check made to fail" in printed
    assert "wrong: AssertionError: arithmetic" in printed
    assert "speedup: 60, target at least 50: met" in printed


def test_a_missed_target_gives_status_1_and_a_skipped_check_status_0(tmp_path, monkeypatch, capsys):
    status, results = results_of(tmp_path, monkeypatch, missing)
    assert (status, results["checks"][0]["status"]) == (1, "missed")
    assert "engine/roofline: 1.7, target at most 1.5: missed" in capsys.readouterr().out
    status, results = results_of(tmp_path, monkeypatch, skipping)
    assert (status, results["checks"][0]["status"]) == (0, "skipped")
    assert results["checks"][0]["reason"] == "needs something else"


def test_checks_for_which_no_time_is_left_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "CHECKS", {"passing": gpu_check.Entry(passing, 10)})
    file = tmp_path / "results.json"
    assert gpu_check.main([*TINY, "--here", "--minutes", "0", "--json", str(file)]) == 0
    (entry,) = json.loads(file.read_text())["checks"]
    assert (entry["status"], entry["reason"]) == ("skipped", "no time left of 0 minutes")


def test_without_cuda_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--device: expected a CUDA device, got none")


def test_list_describes_every_check(capsys):
    assert gpu_check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == NAMES
    assert all(len(line.split()) > 3 for line in lines)


def test_an_unknown_check_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        gpu_check.main([*TINY, "--only", "speed"])
    assert error.value.code == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_layer_speed_is_compared_with_the_cost_model(monkeypatch):
    monkeypatch.setattr(data_sheets, "of_device", lambda _: data_sheets.HARDWARE[3])
    entry = run_check("layer_speed", layers.check_layer_speed, tiny_setup())
    assert entry["status"] == "passed", entry
    assert entry["details"]["limits"] == "H200"
    for case in entry["cases"]:
        assert case["engine/roofline"] >= case["engine/predicted"] > 0  # of a CPU, only the path matters


def test_model_stops_at_its_deadline_and_records_the_blocks():
    entry = run_check("model", models.check_model, tiny_setup(seconds=-1))
    assert entry["status"] == "passed", entry
    details = entry["details"]
    assert (details["blocks"], details["blocks_of_shape"], details["reduced_by"]) == (1, 3, "time")
    assert details["seconds_of_shape_extrapolated"] == pytest.approx(3 * details["seconds"], abs=0.01)


def test_model_of_full_size_is_compared_with_the_cost_model_and_its_target(monkeypatch):
    monkeypatch.setattr(data_sheets, "of_device", lambda _: data_sheets.HARDWARE[3])
    report = Report()
    models._compare_with_cost_model(torch.device("cpu"), report, 61.0, 32)
    assert 0 < report.details["limit_seconds"] <= report.details["predicted_seconds"] < 60
    assert [(target["most"], target["met"]) for target in report.targets] == [(60, False)]
    report = Report()
    models._compare_with_cost_model(torch.device("cpu"), report, 10.0, 8)  # too few blocks for the target
    assert report.targets == []


def tiny_setup(seconds: float = 60) -> Setup:
    return Setup(torch.device("cpu"), True, time.monotonic() + seconds)


def test_a_process_that_exceeds_its_time_counts_as_failed(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.1)
    arguments = argparse.Namespace(device="cpu", tiny=True)
    entry = gpu_check.run_apart("selection", arguments, 0.0)
    assert entry["status"] == "failed"
    assert entry["error"].startswith("the process was stopped")


@pytest.mark.slow
def test_a_process_without_results_counts_as_failed():
    entry = gpu_check.run_apart("unknown", argparse.Namespace(device="cpu", tiny=True), 60.0)
    assert entry["status"] == "failed"
    assert entry["error"] == "the process ended with status 2"
    assert "invalid choice: 'unknown'" in entry["traceback"]


@pytest.mark.slow
def test_script_runs_each_check_in_its_own_process(tmp_path):
    file = tmp_path / "results.json"
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(REPOSITORY / "scripts" / "gpu_check.sh"), *TINY, "--only", "moments", "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(file.read_text())["checks"]
    assert (entry["name"], entry["status"]) == ("moments", "passed")
    assert entry["process_seconds"] > entry["seconds"]


@pytest.mark.slow
def test_all_checks_pass_at_tiny_sizes(tmp_path):
    file = tmp_path / "results.json"
    status = gpu_check.main([*TINY, "--here", "--minutes", "30", "--json", str(file)])
    results = json.loads(file.read_text())
    assert status == 0, results
    assert_structure(results)
    found = {entry["name"]: entry for entry in results["checks"]}
    assert found.keys() == NAMES
    skipped = {name: entry["reason"] for name, entry in found.items() if entry["status"] == "skipped"}
    expected = {"sparse_speed": "expected a CUDA device with sparse tensor cores, got cpu"}
    if not SHARED.is_dir():
        expected["command"] = "needs the model and the texts in the folder ../shared/data beside the checkout"
        expected["golden"] = "needs the golden cases in the folder ../shared/golden beside the checkout"
    assert skipped == expected
    assert all(found[name]["cases"] for name in NAMES - skipped.keys())
    assert found["collectives"]["details"]["backend"] == "gloo"
    assert found["model"]["details"]["blocks"] == 3
    names = [case["name"] for case in found["layers"]["cases"]]
    assert {"random, sparsegpt, 2:4, order, numba", "random, oats, 4:8, target, auto"} <= set(names)
