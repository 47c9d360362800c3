"""Loading of texts: the format follows from the file suffix, case-insensitively, and from the content."""

from __future__ import annotations

import json

import pytest

from rose_exp.data import load_prompts, load_text
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.texts import (
    JSON_SUFFIXES,
    TABLE_SUFFIXES,
    UNSUPPORTED_SUFFIXES,
    PromptSettings,
    TextSettings,
    text_format,
)

from ..runs.test_identity import identity

CASES = (str.lower, str.upper, str.title)
PLAIN_SUFFIXES = ("", ".txt", ".text", ".md", ".raw", ".log", ".jsonl.txt", ".unknown")
DOCUMENTS = ["a cat", 'with "quotes",\nlines and \u2028 in it', "", "ü"]
ROWS = [{"id": i, "body": document} for i, document in enumerate(DOCUMENTS)]
JSON_CONTENTS = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "unescaped lines": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "lines from Windows": "\ufeff" + "\r\n".join(json.dumps(row) for row in ROWS),
    "array": json.dumps(ROWS),
    "indented array": "\n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n",
}
PLAIN_CONTENTS = {
    "prose": "Once upon a time\nthere was {a} [bear].",
    "braces": "{not json}\n{neither}",
    "brackets": "[1] A footnote\n[2] Another",
    "number": "1984",
    "JSON later on": 'Rows look like this:\n{"body": "a"}',
}


def load(path, **options):
    return load_text(TextSettings(path=str(path), **options), "c").documents


@pytest.mark.parametrize("content", JSON_CONTENTS)
@pytest.mark.parametrize("suffix", JSON_SUFFIXES)
@pytest.mark.parametrize("case", CASES)
def test_json_formats_give_the_same_documents(case, suffix, content, tmp_path):
    path = tmp_path / f"rows{case(suffix)}"
    path.write_bytes(JSON_CONTENTS[content].encode())
    assert load(path, field="body") == DOCUMENTS
    assert load(path, field="body", rows=2) == DOCUMENTS[:2]
    assert not TextSettings(path=str(path)).problems("c")
    prompts = load_prompts(PromptSettings(path=str(path), field="body", samples=3), "c").texts
    assert prompts == [document for document in DOCUMENTS if document]


@pytest.mark.parametrize("suffix", PLAIN_SUFFIXES)
@pytest.mark.parametrize("case", CASES)
def test_plain_text_is_read_verbatim_and_json_content_is_rejected(case, suffix, tmp_path):
    path = tmp_path / f"text{case(suffix)}"
    assert text_format(path) == "text"
    for content in PLAIN_CONTENTS.values():
        path.write_text(content, encoding="utf-8")
        assert load(path) == [content]
        assert not TextSettings(path=str(path)).problems("c")
    for content in (*JSON_CONTENTS.values(), json.dumps(ROWS[0]), json.dumps(ROWS[0], indent=2), "\n \n" + json.dumps(ROWS[0])):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(RoseExpError, match=r"c\.path: expected plain text in .*, got JSON; .* a suffix such as \.jsonl"):
            load(path)
        with pytest.raises(RoseExpError, match=r"c\.path: expected plain text"):
            load_prompts(PromptSettings(path=str(path), samples=1), "c")


@pytest.mark.parametrize("suffix", sorted(UNSUPPORTED_SUFFIXES))
@pytest.mark.parametrize("case", CASES)
def test_unsupported_formats_are_reported_by_settings_validation(case, suffix, tmp_path):
    path = tmp_path / f"rows.jsonl{case(suffix)}"
    path.write_text(JSON_CONTENTS["lines"])
    assert text_format(path) is None
    for settings in (TextSettings(path=str(path)), PromptSettings(path=str(path), samples=1)):
        (problem,) = settings.problems("c")
        assert problem.startswith("c.path: expected a supported format, which is plain text (.txt), JSON rows (.json, .jsonl")
        assert problem.endswith(f"got {str(path)!r}")


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
@pytest.mark.parametrize("case", CASES)
def test_tables_are_accepted_for_prompts_only(case, suffix, tmp_path):
    path = tmp_path / f"table{case(suffix)}"
    path.write_text("\ufeffPrompt\tId\na cat\t1\na dog\t2\n", encoding="utf-8")
    assert load_prompts(PromptSettings(path=str(path), field="Prompt", samples=2), "c").texts == ["a cat", "a dog"]
    assert not PromptSettings(path=str(path), samples=1).problems("c")
    (problem,) = TextSettings(path=str(path)).problems("c")
    assert problem.startswith("c.path: expected a supported format, which is plain text")


def test_suffix_groups_are_disjoint():
    groups = [set(JSON_SUFFIXES), set(TABLE_SUFFIXES), set(UNSUPPORTED_SUFFIXES)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert all(suffix == suffix.lower() and suffix.startswith(".") for group in groups for suffix in group)


def test_run_id_depends_on_the_format_and_not_on_suffix_case(tmp_path):
    def of(name: str) -> str:
        (tmp_path / name).write_text('{"text": "x"}')
        return identity("calibration=local", f"calibration.path={tmp_path / name}")

    assert of("a.jsonl") == of("a.JSONL") == of("b.NdJson") == of("c.json")
    assert of("a.txt") == of("a.TXT") == of("b.md")
    assert of("a.jsonl") != of("a.txt")


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ('{"text": "a"}\n{"text": ', "text", r"c\.path: expected JSON in .*a.jsonl line 2, got '{\"text\": '"),
        ('\n{"text": "a"}\n["b"]', "text", r"c\.path: expected a JSON object in .*a.jsonl line 3, got list"),
        ('["a", "b"]', "text", r"c\.path: expected a JSON object in .*a.jsonl row 1, got str"),
        ("7", "text", r"c\.path: expected a JSON object in .*a.jsonl line 1, got int"),
        ('{"text": "a"}', "txt", r"c\.field: expected a field of .* row 1, one of text, got 'txt'; did you mean 'text'"),
        ('{"text": "a"}\n{"text": null}', "text", r"c\.field: expected text in field 'text' of .* line 2, got null"),
        ('[{"text": ["a"]}]', "text", r"c\.field: expected text in field 'text' of .* row 1, got \[\"a\"\]"),
        ("", "text", r"c: expected text, got none"),
        ("[]", "text", r"c: expected text, got none"),
        ("\xff\xfe".encode("latin-1"), "text", r"c\.path: expected UTF-8 text in .*a.jsonl, got UTF-16"),
        ("\xe9".encode("latin-1"), "text", r"c\.path: expected UTF-8 text in .*a.jsonl: 'utf-8' codec can't decode byte 0xe9"),
        ('{"text": "a"}'.encode("utf-16-le"), "text", r"c\.path: expected UTF-8 text in .*a.jsonl, got a NUL character"),
        ('{"text": "a"}\n{"text": "a\\ud83d."}', "text", r"of .* line 2, got the lone surrogate '\\ud83d' at character 1"),
        ('{"text": "a", "text": "b"}', "text", r"c\.path: .*: the key 'text' occurs twice in one object"),
        ('{"text": "a"}\n{"id": 1, "id": 2, "text": "b"}', "text", r"line 2, .*: the key 'id' occurs twice in one object"),
        ('{"text": "a"}\n' + "[" * 200_000, "text", r"line 2, got '\[+': nested too deeply"),
        ("[" * 200_000, "text", r"c\.path: expected a JSON array in .*a.jsonl: nested too deeply"),
        ('{"text": ' + "1" * 9_999 + "}", "text", r"line 1, got .*: Exceeds the limit"),
        ('{"text": "a"}\nnull', "text", r"c\.path: expected a JSON object in .* line 2, got NoneType"),
        ('{"text": "a"}\n{"txt": "a"}', "text", r"c\.field: expected a field of .* line 2, one of txt, got 'text'"),
    ],
)
def test_invalid_files_raise_an_error(tmp_path, content, field, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RoseExpError, match=message):
        load_text(TextSettings(path=str(path), field=field), "c")


def test_documents_are_joined_by_the_separator(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(4)) + "\n")
    assert load_text(TextSettings(path=str(path), rows=3, separator="|"), "c").joined == "row 0|row 1|row 2"


def test_dataset_rows_without_text_raise_an_error(monkeypatch):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["a", None]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    settings = TextSettings(dataset="some/set", split="train")
    with pytest.raises(RoseExpError, match=r"c\.field: expected text in field 'text' of some/set row 2, got null"):
        load_text(settings, "c")
    assert load_text(settings.model_copy(update={"rows": 1}), "c").documents == ["a"]


def test_unreachable_hub_raises_an_error():
    with pytest.raises(RoseExpError, match="c.dataset: cannot load 'allenai/c4' from the hub"):
        load_text(TextSettings(dataset="allenai/c4", split="train"), "c")


def test_wikitext2_has_the_published_number_of_documents(shared):
    assert len(load(shared / "data/text/wikitext2_raw_test.jsonl")) == 4358
