"""Every damaged or odd input file gives a result or one error: no traceback, and nothing half-written."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from .damaging import BYTES, JSON, ROWS, VALUES
from .odd_inputs import diffusion, execute, language, write_inputs, zero_shot

SEED = 27
FAST, SLOW, EXHAUSTIVE = 24, 56, 120
WRITTEN = {"run.json", ".lock", "rose-exp.log"}  # by a run that fails
MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SHARDS = ("model.safetensors.index.json", "model-00001-of-00003.safetensors")
PIPELINE = (
    *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/config.json"),
    "text_encoder/model.safetensors",
)
INPUTS: dict[str, Callable[[Path], list[str]]] = {  # a file, and the command that reads it
    **{f"whole/{name}": language for name in (*MODEL, "model.safetensors")},
    **{f"sharded/{name}": lambda folder: language(folder, "sharded") for name in SHARDS},
    "torch/pytorch_model.bin": lambda folder: language(folder, "torch"),
    "gguf/model.gguf": lambda folder: language(folder, "gguf/model.gguf"),
    "texts/rows.jsonl": language,
    "texts/rows.json": lambda folder: language(folder, calibration="rows.json"),
    "texts/text.txt": language,
    "questions/piqa_validation.jsonl": zero_shot,
    **{f"texts/prompts{suffix}": lambda f, s=suffix: diffusion(f, f"prompts{s}") for suffix in (".txt", ".tsv", ".jsonl")},
    **{f"pipeline/{name}": diffusion for name in PIPELINE},
}


def mutations(name: str) -> list[str]:
    """Return the names of the mutations of a file, in a random but fixed order."""
    own = [*BYTES, *(JSON if name.endswith(".json") else ()), *(ROWS if name.endswith(".jsonl") else ())]
    random.Random(f"{SEED} {name}").shuffle(own)
    return own


def cases():
    """Yield pairs of a file and a mutation, one of each file in turn."""
    names = list(INPUTS)
    random.Random(SEED).shuffle(names)
    left = {name: mutations(name) for name in names}
    while any(left.values()):
        for name in names:
            if left[name]:
                yield name, left[name].pop()


CASES = list(islice(cases(), FAST + SLOW + EXHAUSTIVE))
MORE = [pytest.param(*case, marks=() if i < SLOW else pytest.mark.exhaustive) for i, case in enumerate(CASES[FAST:])]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def run(name: str, mutation: str, inputs: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # raises errors of the program here, instead of printing them
    shutil.copytree(inputs, folder / "in")
    (BYTES | JSON | ROWS)[mutation](folder / "in" / name, random.Random(f"{SEED} {name} {mutation}"))
    outcome = execute(INPUTS[name](folder / "in"), folder / "out")
    assert "Traceback" not in outcome.output
    if outcome.status == 0:
        assert not outcome.lines
        assert json.loads((folder / "out/run.json").read_text())["status"] == "finished"
        return
    assert outcome.status in (1, 2)
    assert len(outcome.lines) == 1, outcome.lines
    assert len(outcome.lines[0]) < 1000
    assert outcome.files <= (WRITTEN if outcome.status == 1 else set())
    if outcome.status == 1:
        record = json.loads((folder / "out/run.json").read_text())
        assert record["status"] == "failed"
        assert record["error"].startswith("RoseExpError: ")


@pytest.mark.parametrize(("name", "mutation"), CASES[:FAST])
def test_damaged_files_give_a_result_or_one_error(name, mutation, inputs, tmp_path, monkeypatch):
    run(name, mutation, inputs, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutation"), MORE)
def test_more_damaged_files_give_a_result_or_one_error(name, mutation, inputs, tmp_path, monkeypatch):
    run(name, mutation, inputs, tmp_path, monkeypatch)


@pytest.mark.parametrize("command", [language, zero_shot, diffusion])
def test_undamaged_files_give_a_result(command, inputs, tmp_path):
    outcome = execute(command(inputs), tmp_path / "out")
    assert outcome.status == 0, outcome.output
    assert {"run.json", "model"} <= outcome.files


def test_rows_of_every_type_are_read_or_rejected(tmp_path):
    """One command per value: what a row is, and what its text is."""
    from rose_exp.data import load_text
    from rose_exp.runtime.errors import RoseExpError
    from rose_exp.settings.texts import TextSettings

    path = tmp_path / "rows.jsonl"
    for value in VALUES:
        for row in (value, {"text": value}, {"other": value}):
            path.write_text(f'{{"text": "a b"}}\n{json.dumps(row)}\n')
            if isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"] != "\ud800":
                assert load_text(TextSettings(path=str(path)), "calibration").documents == ["a b", row["text"]]
                continue
            with pytest.raises(RoseExpError, match=r"^calibration\.(path|field): expected .* line 2, "):
                load_text(TextSettings(path=str(path)), "calibration")
