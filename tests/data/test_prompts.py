"""Loading of prompts for diffusion models."""

from __future__ import annotations

import json

import pytest

from rose_exp.data import load_prompts
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.texts import PROMPTS, PromptSettings, prompts_file


def load(**options):
    return load_prompts(PromptSettings(**({"samples": 2} | options)), "calibration")


def test_embedded_prompt_sets_are_disjoint():
    sets = [prompts_file(name).read_text(encoding="utf-8").splitlines() for name in PROMPTS[:2]]
    assert [len(texts) for texts in sets] == [100, 32]
    assert len(set(sets[0]) | set(sets[1])) == 132
    assert load(embedded=PROMPTS[0], samples=100).texts == sets[0]
    with pytest.raises(RoseExpError, match=r"calibration\.samples: expected at most 32.*got 33"):
        load(embedded=PROMPTS[1], samples=33)


def test_prompts_from_lines_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \na cow\n", encoding="utf-8")
    found = load(path=str(path))
    assert found.texts == ["a cat", "a dog"]
    assert found.protocol["prompts"] == 2
    assert found.protocol["sha256"] != load(path=str(path), samples=3).protocol["sha256"]


def test_prompts_from_a_table_column(tmp_path):
    bare, headed = tmp_path / "bare.tsv", tmp_path / "headed.tsv"
    bare.write_text('a "big" cat\thttp://x\na dog\thttp://y\n', encoding="utf-8")
    headed.write_text("Id\tPrompt\n1\ta hen\n2\ta pig\n", encoding="utf-8")
    assert load(path=str(bare)).texts == ['a "big" cat', "a dog"]
    assert load(path=str(headed), field="Prompt").texts == ["a hen", "a pig"]
    (tmp_path / "none.tsv").write_text("", encoding="utf-8")
    with pytest.raises(RoseExpError, match="expected prompts"):
        load(path=str(tmp_path / "none.tsv"))


def test_prompts_from_a_json_lines_field(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"caption": f"scene {i}"}) + "\n" for i in range(3)), encoding="utf-8")
    assert load(path=str(path), field="caption").texts == ["scene 0", "scene 1"]


def test_prompt_sets_from_the_literature(shared):
    folder = shared / "data" / "prompts"
    captions = load(path=str(folder / "Validation_GCC-1.1.0-Validation.tsv"), samples=15000)
    assert len(captions.texts) == 15000
    assert not any("\t" in text or text.startswith("http") for text in captions.texts)
    assert len(load(path=str(folder / "drawbench.txt"), samples=200).texts) == 200
    assert load(path=str(folder / "PartiPrompts.tsv"), field="Prompt", samples=1600).texts[0] != "Prompt"


def test_damaged_tables_are_named(tmp_path):
    path = tmp_path / "prompts.tsv"
    for content, message in {"a" * 200_000: "field larger than field limit", "a\0b": "got a NUL character"}.items():
        path.write_text(content)
        with pytest.raises(RoseExpError, match=rf"^calibration\.path: .*prompts\.tsv.*{message}"):
            load(path=str(path))
