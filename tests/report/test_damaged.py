"""Reports over folders with damaged run records and studies."""

from __future__ import annotations

import json
import random

import pytest

from rose_exp.cli.report import main
from rose_exp.report import collect_records
from rose_exp.report.figures import read_studies
from rose_exp.report.files import write_report
from rose_exp.runtime.errors import RoseExpError
from rose_exp.tracking import read_record
from rose_exp.tracking.reading import LARGEST, REMEDY

from .damage import damaged, places, replaced
from .records import record

GOOD = record("SparseGPT", 27.0)
TEXT = json.dumps(GOOD)
CASES = {
    "empty": b"",
    "blank": b" \n",
    "half": TEXT[: len(TEXT) // 2].encode(),
    "text": b"not JSON",
    "binary": bytes(range(256)),
    "utf16": TEXT.encode("utf-16"),
    "list": b"[]",
    "null": b"null",
    "number": b"1e999",
    "huge_number": b"1" * 10_000,
    "other_tool": b'{"name": "x", "status": "done"}',
    "status_of_another_type": b'{"status": ["finished"]}',
    "only_status": b'{"status": "finished"}',
    "deep_list": b"[" * 100_000 + b"]" * 100_000,
    "deep_mapping": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep_inside": TEXT.replace('"seed": 0', '"seed": 0, "x": ' + "[" * 300 + "]" * 300, 1).encode(),
    "two_records": (TEXT + TEXT).encode(),
    "swapped": json.dumps(GOOD | {"metrics": GOOD["layers"], "layers": GOOD["metrics"]}).encode(),
}


def write(folder, name: str, content: bytes):
    path = folder / name / "run.json"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", CASES)
def test_damaged_record_is_skipped_with_a_warning(case, tmp_path, caplog, capsys):
    write(tmp_path, "good", TEXT.encode())
    path = write(tmp_path, "bad", CASES[case])
    main([str(tmp_path)])
    assert "| SparseGPT | 27.00 |" in capsys.readouterr().out
    (warning,) = caplog.messages
    assert warning.startswith("skipped: ")
    assert str(path) in warning
    assert "\n" not in warning
    assert len(warning) < 600


@pytest.mark.parametrize("case", CASES)
def test_error_of_a_single_record_names_the_file_and_the_remedy(case, tmp_path):
    path = write(tmp_path, "bad", CASES[case])
    with pytest.raises(RoseExpError) as error:
        read_record(path)
    assert str(path) in str(error.value)
    assert REMEDY in str(error.value)
    assert "\n" not in str(error.value)


def test_huge_files_and_folders_are_skipped(tmp_path, caplog):
    write(tmp_path, "good", TEXT.encode())
    with write(tmp_path, "huge", b"").open("wb") as file:
        file.truncate(LARGEST + 1)
    (tmp_path / "folder" / "run.json").mkdir(parents=True)
    records = collect_records(tmp_path)
    assert [path.parent.name for path, _ in records] == ["good"]
    assert len(caplog.messages) == 2
    assert "expected at most 512 MiB" in caplog.text


def test_only_damaged_records_are_an_error(tmp_path, capsys):
    write(tmp_path, "bad", b"")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 1
    assert f"DIR: expected a run.json that is not damaged, got none in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def report_beside(folder, content) -> str:
    """Return the report of a valid record next to a damaged one."""
    (folder / "bad" / "run.json").write_text(json.dumps(content))
    return write_report([folder])


@pytest.fixture
def runs(tmp_path):
    write(tmp_path, "good", json.dumps(record("Wanda", 70.0, 5, run_id="good")).encode())
    write(tmp_path, "same_row", json.dumps(record("SparseGPT", 27.0, 1, reordered=3)).encode())
    write(tmp_path, "bad", b"")
    return tmp_path


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_never_stops_a_report(seed, runs):
    base = record("SparseGPT", 27.0, reordered=3)
    base["layers"] = base["layers"][:3]
    base["events"] = [{"kind": "unused_tensors", "layer": None, "detail": "x"}]
    for content in damaged(base, random.Random(seed), 40):
        assert "| Wanda | 70.00 |" in report_beside(runs, content)


@pytest.mark.slow
def test_no_wrong_value_stops_a_report(runs):
    base = record("SparseGPT", 27.0, reordered=1)
    base["layers"] = base["layers"][:1]
    for place in places(base):
        for value in (None, "text", 10**400, [], {}, {"a": {"b": 1}}):
            assert "| Wanda | 70.00 |" in report_beside(runs, replaced(base, place, value)), (place, value)


STUDY = {
    "layer": "model.layers.0.o_proj",
    "sparsity": "70% unstructured",
    "cumulative": {"left to right": [0.1, 0.2], "ROSE": [0.05, 0.15]},
    "worst": 1,
    "moved": [0.1, 0.2],
    "reorderings": {way: {"none": {"0.6": 0.1}, "column": {"0.6": 0.2}} for way in ("descending", "ascending")},
    "heat": {"natural": [[0.1, 0.2]], "ROSE": [[0.2, 0.1]]},
    "rows": 4,
    "columns": 8,
    "damping": 0.01,
}


def test_damaged_studies_are_skipped_with_a_warning(tmp_path, caplog):
    path = write(tmp_path, "good", TEXT.encode()).parent / "figures"
    path.mkdir()
    (path / "a.json").write_text(json.dumps(STUDY))
    (path / "b.json").write_text("{")
    generator = random.Random(0)
    for i, content in enumerate(damaged(STUDY, generator, 40)):
        (path / f"c{i}.json").write_text(json.dumps(content))
    studies = read_studies(tmp_path / "good")
    assert STUDY in studies
    assert len(studies) + len(caplog.messages) == 42
    assert f"skipped: {path / 'b.json'} is not a layer study" in caplog.text
    write_report([tmp_path])
