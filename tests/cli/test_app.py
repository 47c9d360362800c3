"""End-to-end tests of the command with a small trained model and local files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rose_exp.evaluation import perplexity
from rose_exp.report import collect_records

PARTS = [
    "pruning.calibrating",
    "pruning.moments",
    "pruning.studying",
    "pruning.solving",
    "pruning.advancing",
    "pruning.surveying",
    "pruning.reconstructing",
    "pruning.shared",
]


def rose_exp(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rose_exp", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_run_writes_its_record_and_saved_model(small, tmp_path):
    done = rose_exp(*small, "sparsity=2:4", "save=true", "hydra.run.dir=out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ROSE" in done.stdout
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["status"] == "finished"
    assert record["label"] == "ROSE"
    assert record["metrics"]["sparsity"] == 0.5
    assert record["config"]["calibration"]["samples"] == 4
    assert set(record["seconds"]) == {"preflight", "texts", "loading", "pruning", "evaluation", "saving", *PARTS}
    assert record["peak_memory_bytes"]["host"] > 1e8
    assert len(record["layers"]) == 35
    assert {"name", "sparsity", "error", "relative_range", "reordered", "damping", "seconds"} <= set(record["layers"][0])
    protocol = record["protocol"]
    assert protocol["calibration"]["windows"] == 4
    assert protocol["calibration"]["window"] == 128
    assert protocol["evaluation"]["local"]["windows"] == 8
    assert protocol["versions"]["torch"]
    assert len(protocol["model"]["sha256"]) == 64
    assert protocol["seed"] == 0
    assert protocol["backend"] == "numba"

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    for name, value in saved.state_dict().items():
        if "_proj" in name:
            groups = (value == 0).unflatten(1, (-1, 4)).sum(dim=2)
            assert (groups >= 2).all(), name
    again = evaluate(saved, small)
    assert again == pytest.approx(record["metrics"]["perplexity.local"], rel=1e-4)


def evaluate(model, overrides) -> float:
    from rose_exp.data import contiguous_windows, load_text
    from rose_exp.models import load_tokenizer
    from rose_exp.settings.schema import ModelSettings
    from rose_exp.settings.texts import TextSettings

    value = dict(override.split("=", 1) for override in overrides)
    tokenizer = load_tokenizer(ModelSettings(path=value["model.path"]))
    text = load_text(TextSettings(path=value["evaluation.perplexity.local.path"]), "here")
    return perplexity(model, contiguous_windows(text, tokenizer, 128, 8, "here").tokens).value


def test_sweep_shares_calibration_windows_and_prints_a_table(small, tmp_path):
    done = rose_exp("-m", *small, "method=dense,sparsegpt,rose", "hydra.sweep.dir=out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("method"))
    assert [line.split()[0] for line in lines[header + 2 : header + 5]] == ["Dense", "SparseGPT", "ROSE"]
    assert str(tmp_path / "out") in done.stdout
    records = [record for _, record in collect_records(tmp_path / "out")]
    drawn = [r["protocol"]["calibration"]["tokens_sha256"] for r in records if r["protocol"]["calibration"]]
    assert len(drawn) == 2
    assert len(set(drawn)) == 1
    assert records[0]["metrics"]["perplexity.local"] < records[1]["metrics"]["perplexity.local"]


@pytest.mark.slow
def test_repeated_runs_are_bitwise_equal(small, tmp_path):
    for name in ("a", "b"):
        assert rose_exp(*small, f"hydra.run.dir={name}", folder=tmp_path).returncode == 0
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("a", "b"))
    assert first["metrics"] == second["metrics"]
    assert [layer["error"] for layer in first["layers"]] == [layer["error"] for layer in second["layers"]]


def test_invalid_settings_raise_before_any_file_is_written(tmp_path):
    done = rose_exp("method=sparsgpt", "seed=-1", folder=tmp_path)
    assert done.returncode == 2
    assert "2 errors in the configuration" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_failed_job_is_recorded_and_the_sweep_continues(small, tmp_path):
    done = rose_exp("-m", *small, "calibration.window=128,1024", "hydra.sweep.dir=out", folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    records = [record for _, record in collect_records(tmp_path / "out")]
    assert [record["status"] for record in records] == ["finished", "failed"]
    assert "calibration.window: expected at most 512, the model's maximum sequence length" in records[1]["error"]
    assert "1 ran, 1 failed, of 2 jobs" in done.stdout
    reason = next(line for line in done.stdout.splitlines() if line.startswith("  calibration.window=1024"))
    assert "failed: RoseExpError: calibration.window: expected at most 512" in reason


def test_unreachable_hub_is_reported(small, tmp_path):
    done = rose_exp(*small, "model=llama2-7b", "model.path=meta-llama/Llama-2-7b-hf", "hydra.run.dir=out", folder=tmp_path)
    assert done.returncode == 1
    assert "model.path: cannot load 'meta-llama/Llama-2-7b-hf'" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "out/run.json").read_text())["status"] == "failed"


def test_relative_paths_refer_to_the_folder_of_the_command(small, shared, tmp_path):
    """With hydra.job.chdir=true, Hydra changes to the folder of the run."""
    (tmp_path / "data").symlink_to(shared / "data")
    relative = [argument.replace(str(shared / "data"), "data") for argument in small]
    done = rose_exp(*relative, "hydra.job.chdir=true", "hydra.run.dir=out/put", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out/put/run.json").read_text())["status"] == "finished"
    assert not (tmp_path / "out/put/out").exists()


@pytest.mark.parametrize(
    "subdir",
    [
        "a/${run_id:}",
        pytest.param("a/${hydra.job.num}", marks=pytest.mark.slow),
        pytest.param("a/${now:%f}-${hydra.job.num}", marks=pytest.mark.slow),
    ],
)
def test_table_of_a_sweep_finds_jobs_in_any_folder(subdir, small, tmp_path):
    jobs = [*small, "seed=0,1", "figures.draw=false", "pipeline.layers=['*.0.mlp.*']", f"hydra.sweep.subdir={subdir}"]
    done = rose_exp("-m", *jobs, "hydra.sweep.dir=out/${now:%H-%M-%S}", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ran, of 2 jobs" in done.stdout
    assert len(list(tmp_path.glob("out/*/a/*/run.json"))) == 2
