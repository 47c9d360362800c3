"""Summary of the outcomes of sweep jobs."""

from __future__ import annotations

import json

from rose_exp.sweeps.summary import format_outcomes, outcomes
from rose_exp.tracking.record import versions

START = "2026-01-01T12:00:00.000+00:00"
BEFORE, AFTER = "2026-01-01T11:00:00.000+00:00", "2026-01-01T13:00:00.000+00:00"


def record(folder, run_id, status="finished", started=AFTER, error=None, torch=None):
    data = {
        "status": status,
        "run_id": run_id,
        "label": "ROSE",
        "started": started,
        "error": error,
        "metrics": {"sparsity": 0.5, "perplexity.x": 12.0} if status == "finished" else {},
        "seconds": {"pruning": 3.0},
        "config": {"method": {"name": "sparsegpt"}, "sparsity": {"pattern": "unstructured", "ratio": 0.5}},
        "protocol": {"versions": versions() | ({"torch": torch} if torch else {})},
    }
    (folder / run_id).mkdir()
    (folder / run_id / "run.json").write_text(json.dumps(data))


def test_every_outcome_is_reported(tmp_path):
    record(tmp_path, "ran")
    record(tmp_path, "old", started=BEFORE, torch="1.0")
    record(tmp_path, "same", started=BEFORE)
    record(tmp_path, "bad", "failed", error="RoseExpError: no disk")
    record(tmp_path, "older", "failed", BEFORE, error="RoseExpError: no disk")
    record(tmp_path, "killed", "running")
    names = ["ran", "ran", "old", "same", "bad", "older", "killed", "never"]
    found = outcomes([(f"seed={i}", name) for i, name in enumerate(names)], tmp_path, START)
    assert [outcome.state for outcome in found] == [
        "ran", "reused", "reused", "reused", "failed", "unfinished", "unfinished", "not run",
    ]  # fmt: skip
    assert found[2].why.startswith("made with torch 1.0, now ")
    assert found[3].why is None
    text = format_outcomes(found)
    assert "1 ran, 3 reused, 1 failed, 2 unfinished, 1 not run, of 8 jobs" in text
    assert "  seed=4  " in text
    assert f"{tmp_path / 'bad'}  failed: RoseExpError: no disk" in text
    assert "its process ended unexpectedly" in text


def test_unfinished_jobs_have_a_hint_how_to_resume(tmp_path):
    record(tmp_path, "killed", "running")
    hints = [outcomes([("seed=0", "killed")], tmp_path, START, rerun)[0].why for rerun in (False, True)]
    assert [hint.partition("; ")[2] for hint in hints] == [
        "to resume, run the same command again",
        "to resume, run the same command again without rerun=true",
    ]


def test_jobs_are_found_in_renamed_folders(tmp_path):
    record(tmp_path, "abc")
    (tmp_path / "abc").rename(tmp_path / "0")
    assert outcomes([("seed=0", "abc")], tmp_path, START)[0].folder == tmp_path / "0"
