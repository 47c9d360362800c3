"""Contact sheets of one run and of several runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from rose_exp.report.files import write_report
from rose_exp.report.sheets import IMAGES, LARGEST, Pictures, draw_run, draw_sheet, read_pictures, sheets_of_runs

from . import records

PROMPTS = ["a handwritten one", "$two$ and _three"]
RED, MAGENTA, GREEN = (255, 0, 0), (255, 0, 255), (0, 255, 0)


def images(colour, size=16) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (len(PROMPTS), size, size, len(colour))).copy()


def colours(path) -> dict:
    with Image.open(path) as image:
        return {colour: count for count, colour in image.convert("RGB").getcolors(2**24)}


def run_in(folder, label, colour, seed=0, draw=True, **options):
    """Write the record and the images of a run in a folder, and return both."""
    record = records.record(label, 10.0, seed, **options)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    if draw:
        draw_run(Pictures(images(RED), images(colour), PROMPTS), label, folder)
    return folder, record


def test_sheet_has_a_row_per_model(tmp_path):
    rows = {"Dense": images(RED), "OBS-Diff": images(MAGENTA), "Magnitude": images(GREEN)}
    found = colours(draw_sheet(rows, PROMPTS, tmp_path / "figures" / "sheet.png"))
    assert found[RED] > 10_000
    assert found[MAGENTA] == pytest.approx(found[RED], rel=0.05)
    assert found[GREEN] == pytest.approx(found[RED], rel=0.05)


def test_gray_images_are_drawn(tmp_path):
    found = colours(draw_sheet({"Dense": images((0,)), "other": images((128,))}, PROMPTS, tmp_path / "sheet.png"))
    assert found[(128, 128, 128)] > 10_000


@pytest.mark.parametrize("size", [1, 16, LARGEST, LARGEST + 1, 1000])
def test_images_of_a_run_are_stored_reduced(size, tmp_path):
    draw_run(Pictures(images(RED, size), images(MAGENTA, size), PROMPTS), "OBS-Diff", tmp_path)
    assert (tmp_path / "figures" / "contact_sheet.png").is_file()
    stored = read_pictures(tmp_path)
    assert stored.prompts == PROMPTS
    assert max(stored.dense.shape[1:3]) <= min(size, LARGEST)
    assert (stored.dense == RED).all()
    assert (stored.pruned == MAGENTA).all()


def test_runs_of_a_column_share_a_sheet(tmp_path):
    runs = [
        run_in(tmp_path / "a", "SparseGPT", MAGENTA),
        run_in(tmp_path / "b", "Wanda", GREEN),
        run_in(tmp_path / "c", "Wanda", RED, seed=1),
        run_in(tmp_path / "d", "Wanda", RED, ratio=0.5),  # alone in its column
        run_in(tmp_path / "e", "DSnoT", RED, draw=False),
    ]
    (sheet,) = sheets_of_runs(runs, "sparsity")
    assert sheet.title == "Llama-2-7b-hf, 0.7"
    assert sheet.runs == [record["run_id"] for _, record in runs[:3]]
    assert list(sheet.rows) == ["Dense", "SparseGPT", "Wanda"]
    assert (sheet.rows["Dense"] == RED).all()
    assert (sheet.rows["Wanda"] == GREEN).all()


def test_equal_labels_with_other_options_have_rows_of_their_own(tmp_path):
    other = run_in(tmp_path / "b", "SparseGPT", GREEN, config__reorder__columns="descending")
    runs = [run_in(tmp_path / "a", "SparseGPT", MAGENTA), other]
    (sheet,) = sheets_of_runs(runs, "sparsity")
    assert list(sheet.rows) == ["Dense", "SparseGPT", f"SparseGPT ({other[1]['run_id']})"]
    assert (sheet.rows[f"SparseGPT ({other[1]['run_id']})"] == GREEN).all()


def test_runs_beyond_the_last_row_keep_their_own_sheets(tmp_path, monkeypatch):
    monkeypatch.setattr("rose_exp.report.sheets.ROWS", 3)
    runs = [run_in(tmp_path / label, label, GREEN) for label in ("SparseGPT", "Wanda", "DSnoT")]
    (sheet,) = sheets_of_runs(runs, "sparsity")
    assert sheet.runs == [record["run_id"] for _, record in runs[:2]]


def test_runs_with_other_conditions_do_not_share_a_sheet(tmp_path):
    runs = [
        run_in(tmp_path / "a", "SparseGPT", MAGENTA),
        run_in(tmp_path / "b", "Wanda", GREEN, config__engine__damping=0.1),
    ]
    assert sheets_of_runs(runs, "sparsity") == []


@pytest.mark.parametrize("damage", [b"", b"no tensors", b"\xff" * 100, "no prompts", "prompts", "shape", "type", "names"])
def test_damaged_images_are_skipped_with_a_warning(damage, tmp_path, caplog):
    runs = [run_in(tmp_path / label, label, GREEN) for label in ("SparseGPT", "Wanda", "DSnoT")]
    path = tmp_path / "Wanda" / "figures" / IMAGES
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        tensors = {"dense": images(RED), "pruned": images(RED)}
        tensors |= {"shape": {"pruned": images(RED, 8)}, "type": {"dense": images(RED).astype(float)}}.get(damage, {})
        tensors = {f"other {name}": tensor for name, tensor in tensors.items()} if damage == "names" else tensors
        prompts = json.dumps({"a prompt": 1} if damage == "prompts" else PROMPTS)
        save_file(tensors, path, metadata=None if damage == "no prompts" else {"prompts": prompts})
    (sheet,) = sheets_of_runs(runs, "sparsity")
    assert list(sheet.rows) == ["Dense", "SparseGPT", "DSnoT"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text


def test_report_contains_the_sheets(tmp_path):
    for label, colour in (("SparseGPT", MAGENTA), ("Wanda", GREEN), ("DSnoT", (0, 0, 255))):
        run_in(tmp_path / label, label, colour, ratio=0.5 if label == "DSnoT" else 0.7)
    text, page = write_report([tmp_path]), (tmp_path / "report" / "report.html").read_text()
    assert "contact_sheet_1.png" in text
    found = colours(tmp_path / "report" / "contact_sheet_1.png")
    assert found[MAGENTA] > 10_000
    assert found[GREEN] > 10_000
    assert "<h2>Llama-2-7b-hf, 0.7</h2>" in page
    assert page.count('alt="images of the dense model') == 2  # the third run has its own sheet
