"""Files of killed runs: the next process of the run and rose-exp-clean remove them, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rose_exp
from rose_exp.cli.clean import clean_folders, main
from rose_exp.runs.folder import RunFolder
from rose_exp.runtime.files import PREFIX

from ..conftest import REPOSITORY, small_overrides
from .test_execution import stopped

ONE = "hydra.run.dir=FOLDER/${run_id:}"
SWEEP = ["hydra.sweep.dir=FOLDER"]
TIMED = ("started", "ended", "seconds", "estimate", "peak_memory_bytes", "peak_disk_bytes", "resumed", "config", "tracking")


def result_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what differs between two equal runs."""
    result = {name: value for name, value in record.items() if name not in TIMED}
    result["layers"] = [{k: v for k, v in layer.items() if k != "seconds"} for layer in record["layers"]]
    result["protocol"] = {name: value for name, value in record["protocol"].items() if name != "revision"}
    if "zero_shot" in result["protocol"]:  # the name of the file with all answers contains the time
        result["protocol"]["zero_shot"] = {k: v for k, v in result["protocol"]["zero_shot"].items() if k != "results"}
    result.pop("packages", None)
    result.pop("images", None)
    if "images.speedup" in result["metrics"]:
        result["metrics"] = {k: v for k, v in result["metrics"].items() if k != "images.speedup"}
    return result


def files(folder: Path) -> set[str]:
    """Return the names of all files and folders of runs, except the logs of Hydra."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {path for path in paths if ".hydra" not in path and not path.endswith((".log", ".yaml", ".db"))}


def killed(arguments: list[str], folder: Path, kills: int, seed: int = 0) -> tuple[Path, list[Path]]:
    """Run a command undisturbed and killed; return the folder of the first and those of the others."""
    if any(argument.startswith("hydra.sweep") for argument in arguments):
        arguments = ["-m", *arguments]
    request = {"arguments": arguments, "folder": str(folder), "kills": kills, "seed": seed}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runs.kills", json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "whole", sorted(folder.glob("killed-*"))


def assert_equal_results(whole: Path, others: list[Path], every_run: bool = True) -> None:
    expected = {path.parent.name: json.loads(path.read_text()) for path in whole.glob("**/run.json")}
    assert expected
    for folder in others:
        records = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("**/run.json")}
        if every_run:
            assert files(folder) == files(whole)
        for name in set(records) & set(expected) if every_run else records:
            assert records[name]["status"] == "finished"
            if name in expected:
                assert result_of(records[name]) == result_of(expected[name])
        assert not [path for path in folder.rglob("*") if path.name.startswith(PREFIX) or path.name == "state"]
        assert "removed 0 leftovers" in clean_folders([folder], unfinished=True)


def tiny(shared: Path) -> list[str]:
    sizes = ["calibration.samples=2", "calibration.window=64", "evaluation.perplexity.local.windows=2", "preflight=false"]
    return [*small_overrides(shared), *sizes, "device=cpu"]


@pytest.fixture
def single(shared) -> list[str]:
    options = ["method=wanda", "save=true", "pipeline.activations=disk", "tracking=csv"]
    return [*tiny(shared), *options, ONE]


@pytest.mark.slow
def test_killed_runs_finish_with_equal_results_and_leave_nothing_behind(single, tmp_path):
    assert_equal_results(*killed(single, tmp_path, kills=2))


KILLS = [3, pytest.param(12, marks=pytest.mark.exhaustive)]


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize(
    "options",
    [
        [ONE, "method=rose", "save=true", "pipeline.weights=disk"],
        [ONE, "method=rose_plus", "pipeline.activations=disk"],
        [*SWEEP, "method=dense,wanda,rose", "save=true"],
        [ONE, "method=wanda", "evaluation.zero_shot.tasks=[winogrande]", "evaluation.limit=2"],
    ],
)
def test_killed_commands_finish_with_equal_results(options, kills, shared, tmp_path):
    if any("zero_shot" in option for option in options):
        options = [*options, f"evaluation.zero_shot.data_dir={shared}/data/zeroshot", "evaluation=[local,zero_shot]"]
    assert_equal_results(*killed([*tiny(shared), *options], tmp_path, kills, seed=1), every_run="zero_shot" not in str(options))


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_killed_searches_finish_and_leave_nothing_behind(kills, shared, tmp_path):
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.metric=perplexity.local"]
    search += ["hydra.sweeper.storage=sqlite:///FOLDER/study.db"]
    search += ["method=rose", "engine.block_size=choice(32,64)"]
    whole, others = killed([*tiny(shared), *SWEEP, *search], tmp_path, kills, seed=2)
    assert_equal_results(whole, others, every_run=False)  # a resumed search draws other trials


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_killed_diffusion_runs_finish_with_equal_results(kills, tmp_path):
    options = ["model=small-ddpm", "method=sparsegpt", "save=true", "diffusion.steps=3", "calibration.samples=2"]
    options += ["evaluation.images.samples=2", "evaluation.images.sheet=2", "device=cpu", ONE]
    assert_equal_results(*killed(options, tmp_path, kills, seed=3))


def leave_behind(folder: Path) -> None:
    """Create what a killed process leaves behind, of this and of earlier versions."""
    for name in (f"{PREFIX}12345678", ".activations-ab_12345", ".model-abcdefgh"):
        (folder / name).mkdir()
        (folder / name / "hidden").write_bytes(bytes(1000))
    (folder / ".run.json-abcdefgh").write_text("{")


def test_next_process_of_a_run_removes_leftovers_but_no_other_files(small, tmp_path):
    record = rose_exp.run(small, tmp_path)
    folder = tmp_path / record["run_id"]
    before = files(folder)
    leave_behind(folder)
    (folder / "state").mkdir()
    (folder / "state" / "block-00000.safetensors").write_text("killed between the record and the removal of the state")
    (folder / ".model-of-mine").write_text("kept")
    (folder / "notes.txt").write_text("kept")
    assert rose_exp.run(small, tmp_path) == record  # reused
    assert files(folder) == before | {".model-of-mine", "notes.txt"}
    leave_behind(folder)
    (folder / "state").mkdir()
    (folder / "state" / "mine").write_text("kept")
    rose_exp.run([*small, "rerun=true"], tmp_path / "other")
    assert rose_exp.run(small, tmp_path) == record
    assert files(folder) == before | {".model-of-mine", "notes.txt", "state", "state/mine"}


def temporary(path: str) -> bool:
    """Return whether a path belongs to what :func:`leave_behind` created in a run that is not locked."""
    names = (PREFIX, ".activations-", ".model-", ".run.json-")
    return "locked" not in path and any(part.startswith(names) for part in Path(path).parts)


@pytest.fixture
def outputs(small, tmp_path, monkeypatch) -> dict[str, Path]:
    """A folder with a finished, an interrupted and a locked run, all with leftovers."""
    finished = tmp_path / rose_exp.run(small, tmp_path)["run_id"]
    interrupted = stopped([*small, "seed=1"], tmp_path / "nested", monkeypatch)
    locked = stopped([*small, "seed=2"], tmp_path / "locked", monkeypatch)
    for folder in (finished, interrupted, locked):
        leave_behind(folder)
        (folder / "notes.txt").write_text("kept")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / f"{PREFIX}87654321").mkdir()
    return {"finished": finished, "interrupted": interrupted, "locked": locked, "top": tmp_path}


def test_clean_lists_and_removes_leftovers_only(outputs, capsys):
    top, before = outputs["top"], files(outputs["top"])
    with RunFolder(outputs["locked"]).lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        listed = clean_folders([top, outputs["finished"]], unfinished=True, dry_run=True)
        assert {path for path in files(top) if ".in-use" not in path} == before
        assert "would remove 6 leftovers" in listed
        assert f"{outputs['locked']}: in use by a live process" in listed
        assert f"{outputs['interrupted']}: unfinished run (interrupted)" in listed
        removed = clean_folders([top])
        assert "removed 9 leftovers" in removed
        assert {path for path in files(top) if ".in-use" not in path} == {path for path in before if not temporary(path)}
    main([str(top), "--unfinished"])
    text = capsys.readouterr().out
    assert f"{outputs['interrupted']}: kept notes.txt" in text
    assert set(os.listdir(outputs["interrupted"])) == {"notes.txt"}
    assert (outputs["finished"] / "run.json").exists()
    main([str(top), "--unfinished"])
    assert "removed 0 leftovers, 0 bytes" in capsys.readouterr().out


def test_clean_removes_whole_unfinished_runs(small, tmp_path, monkeypatch):
    folder = stopped(small, tmp_path, monkeypatch)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    text = clean_folders([tmp_path], unfinished=True)
    assert "removed 1 leftover" in text
    assert f"{size / 2**10:.1f} KiB" in text
    assert not folder.exists()


@pytest.mark.parametrize("arguments", [["missing"], ["file"]])
def test_clean_reports_a_wrong_folder(arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / arguments[0])])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("DIR: expected a folder that exists, got ")


def test_clean_skips_runs_with_a_damaged_record(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    leave_behind(folder)
    (folder / "run.json").write_text("{")
    before = files(folder)
    assert "cannot read the run record" in clean_folders([tmp_path], unfinished=True)
    assert files(folder) == before
