"""The rehearsal of zero-shot tasks finds everything that would stop the evaluation after pruning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from rose_exp.evaluation.rehearsal import check_requests
from rose_exp.evaluation.zero_shot import prepared
from rose_exp.models import ModelShape, model_shape
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings, ZeroShotSettings

from ..data.small_tokenizers import build_tokenizer
from ..models.families import build

KINDS = {
    "choices": {
        **{"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "{{label}}"},
        **{"doc_to_choice": "{{[a, 'b']}}", "metric_list": [{"metric": "acc"}]},
    },
    "rolling": {
        **{"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"},
        **{"metric_list": [{"metric": "bits_per_byte"}]},
    },
    "generation": {
        **{"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"},
        **{"metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["x"], "max_gen_toks": 20}},
    },
}
ROWS = [{"q": f"a b {letter}", "a": "c d", "label": 0} for letter in "efgh"]


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> ModelShape:
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    return model_shape(ModelSettings(path=str(folder)))


def settings_of(folder: Path, kind: str, rows=ROWS, **options) -> ZeroShotSettings:
    (folder / "tasks").mkdir()
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}
    task = {"task": "own", "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"} | KINDS[kind]
    (folder / "tasks/own.yaml").write_text(yaml.safe_dump(task))
    return ZeroShotSettings(tasks=["own"], include_path=str(folder / "tasks"), **options)


def requests_of(folder: Path, kind: str, rows=ROWS, **options):
    with prepared(settings_of(folder, kind, rows, **options)) as tasks:
        return tasks.requests


@pytest.mark.parametrize("kind", KINDS)
def test_sound_tasks_pass_and_keep_the_random_state(kind, shape, tmp_path):
    before = torch.get_rng_state()
    requests = requests_of(tmp_path, kind)
    assert len(requests) == len(ROWS) * (2 if kind == "choices" else 1)
    check_requests(requests, build_tokenizer(), shape)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "row",
    [{"q": "a b", "a": "c"}, {"q": "a", "a": "b", "label": "x"}, {"q": "a", "a": "b", "label": 2}, {"q": None, "label": None}],
)
def test_a_damaged_last_row_is_found(row, tmp_path):
    with (
        pytest.raises(RoseExpError, match="zero_shot: (cannot read the rows of own: |expected the number of a choice)"),
        prepared(settings_of(tmp_path, "choices", [*ROWS, row])),
    ):
        pass


def test_only_the_questions_of_the_limit_are_read(tmp_path):
    assert len(requests_of(tmp_path, "choices", limit=2)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_beyond_the_embedding_are_rejected(kind, shape, tmp_path):
    requests = requests_of(tmp_path, kind)
    with pytest.raises(RoseExpError, match=r"evaluation\.zero_shot.*: expected token IDs below 5, .*does the tokenizer belong"):
        check_requests(requests, build_tokenizer(), replace(shape, tokens=5))


def test_answers_longer_than_the_context_and_empty_ones_are_rejected(shape, tmp_path):
    long = [*ROWS, ROWS[0] | {"a": " ".join("c" * 30)}]
    check_requests(requests := requests_of(tmp_path, "choices", long), build_tokenizer(), shape)
    with pytest.raises(RoseExpError, match="of at least one token and at most 20, the model's maximum sequence length, got 30"):
        check_requests(requests, build_tokenizer(), replace(shape, context=20))
    (tmp_path / "empty").mkdir()
    requests = requests_of(tmp_path / "empty", "choices", [*ROWS, ROWS[0] | {"a": ""}])
    with pytest.raises(RoseExpError, match="expected answers of own of at least one token, got ' '"):
        check_requests(requests, build_tokenizer(), shape)


def test_generation_needs_room_and_tokens(shape, tmp_path):
    requests = requests_of(tmp_path, "generation")
    with pytest.raises(RoseExpError, match="expected fewer generated tokens than 20, .*, got 20 for own"):
        check_requests(requests, build_tokenizer(), replace(shape, context=20))
    padded = build_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(RoseExpError, match="the token that pads batches: expected token IDs below 29, .*, got 29"):
        check_requests(requests, padded, replace(shape, tokens=29))
    with pytest.raises(RoseExpError, match=r"expected a tokenizer with a token that ends generated text \(EOS\), got none"):
        check_requests(requests, without_special_tokens(), shape)


def without_special_tokens() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(None).backend_tokenizer, unk_token="<unk>")


def test_texts_without_a_context_need_bos_or_eos(shape, tmp_path):
    requests = requests_of(tmp_path, "rolling")
    with pytest.raises(RoseExpError, match=r"a tokenizer with a token that precedes requests .* \(BOS or EOS\), got none"):
        check_requests(requests, without_special_tokens(), shape)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\n[]\n", "expected a JSON object in .* line 2, got list"),
        (b'{"a": 1}\n{"a": ', "expected a JSON object in .* line 2: Expecting value"),
        (b'{"a": 1, "a": 2}', ".* line 1: the key 'a' occurs twice"),
        (b'\xff\xfe{\x00"\x00', "expected UTF-8 text in .*, got UTF-16"),
        (b"\x1f\x8b\x08\x00", "expected UTF-8 text in "),
    ],
)
def test_damaged_files_of_questions_are_named(content, message, tmp_path):
    (tmp_path / "piqa_validation.jsonl").write_bytes(content)
    settings = ZeroShotSettings(tasks=["piqa"], data_dir=str(tmp_path))
    with pytest.raises(RoseExpError, match=rf"^evaluation\.zero_shot\.data_dir: {message}"), prepared(settings):
        pass
