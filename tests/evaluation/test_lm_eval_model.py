"""Tokenization of lm-eval requests: at most one BOS, at the start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rose_exp.evaluation.lm_eval_model import PrunedLM

from ..data.small_tokenizers import BOS, build_tokenizer, letters
from ..models.families import POSITIONS, build

MODES = ("tokenizer", "windows", "none")


@pytest.fixture(scope="module")
def model():
    return build("gemma3")


def requests(*arguments):
    return [SimpleNamespace(args=own) for own in arguments]


def spied(model, bos, adds_bos=True, **attributes):
    """Return the lm-eval model and the list of input rows it receives, without right padding."""
    lm, seen = PrunedLM(model, build_tokenizer(adds_bos=adds_bos), 2, bos), []
    call = lm._model_call

    def spy(inputs, **options):
        seen.extend(letters(row).rstrip("^") for row in inputs.tolist())  # lm-eval pads with 0, which is BOS here
        return call(inputs, **options)

    lm._model_call = spy
    for name, value in attributes.items():
        setattr(lm, name, value)
    return lm, seen


PAIRS = [("a b c", " d e"), ("<bos> a b f", " g"), ("<bos> <bos> q", " r s"), ("h", " i j k")]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_requests_start_with_one_bos(model, adds_bos):
    lm, seen = spied(model, "windows", adds_bos)
    lm.loglikelihood(requests(*PAIRS))
    assert sorted(seen) == ["^abcd", "^abf", "^hij", "^qr"]


def test_tokenizer_mode_adds_bos_once(model):
    lm, seen = spied(model, "tokenizer")
    lm.loglikelihood(requests(*PAIRS[:2], PAIRS[3]))
    assert sorted(seen) == ["^abcd", "^abf", "^hij"]
    lm, seen = spied(model, "tokenizer", adds_bos=False)
    lm.loglikelihood(requests(PAIRS[0], PAIRS[3]))
    assert sorted(seen) == ["abcd", "hij"]


def test_none_mode_adds_no_bos(model):
    lm, seen = spied(model, "none")
    lm.loglikelihood(requests(PAIRS[0], PAIRS[3]))
    assert sorted(seen) == ["abcd", "hij"]


@pytest.mark.parametrize("bos", MODES)
def test_empty_context_is_conditioned_on_one_bos(model, bos):
    lm, seen = spied(model, bos)
    lm.loglikelihood(requests(("", "a b c"), ("", "<bos> d e")))
    assert sorted(seen) == ["^ab", "^d"]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("bos", MODES)
def test_rolling_windows_in_each_bos_mode(model, bos, adds_bos):
    text = " ".join("abcdefghij")
    lm, seen = spied(model, bos, adds_bos, _max_length=4)
    (found, again) = lm.loglikelihood_rolling(requests((text,), (f"<bos> {text}",)), disable_tqdm=True)
    expected = ["^abc", "^efg", "^i"] if bos == "windows" else ["^abc", "defg", "fghi"]
    assert sorted(set(seen)) == sorted(expected)
    assert found == pytest.approx(again)


def test_rolling_loglikelihood_is_the_sum_over_windows(model):
    text, lm = " ".join("abcdefghij"), spied(model, "windows", _max_length=4)[0]
    expected = 0.0
    for window in ("abcd", "efgh", "ij"):
        ids = torch.tensor([[BOS, *lm.tokenizer(" ".join(window), add_special_tokens=False).input_ids]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].float().log_softmax(dim=-1)
        expected += float(scores.gather(1, ids[0, 1:, None]).sum())
    assert lm.loglikelihood_rolling(requests((text,))) == pytest.approx([expected], rel=1e-5)
    assert lm.loglikelihood_rolling(requests(("",), (text,))) == pytest.approx([0, expected], rel=1e-5)


def test_long_context_is_truncated_and_windows_mode_keeps_bos(model):
    assert PrunedLM(model, build_tokenizer(), 2, "windows").max_length == POSITIONS
    context = " ".join("abcdefghijkl")
    lm, seen = spied(model, "windows", _max_length=6)
    lm.loglikelihood(requests((context, " m n o")))
    assert seen == ["^jklmn"]
    lm, seen = spied(model, "tokenizer", _max_length=6)
    lm.loglikelihood(requests((context, " m n o")))
    assert seen == ["ijklmn"]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_prompt_batches_are_left_padded(model, adds_bos):
    lm, _ = spied(model, "windows", adds_bos)
    lm.tokenizer.pad_token = "<eos>"
    ids, mask = lm.tok_batch_encode(["a b c", "<bos> d"])
    assert [letters(row) for row in ids.tolist()] == ["^abc", "$$^d"]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    cut, _ = lm.tok_batch_encode(["a b c", "d"], left_truncate_len=3)
    assert [letters(row) for row in cut.tolist()] == ["^bc", "$^d"]


@pytest.mark.parametrize("bos", MODES)
def test_generation_prompts_follow_the_bos_mode(model, bos):
    lm, _ = spied(model, bos)
    prompts = []
    lm._model_generate = lambda context, **_: prompts.extend(map(letters, context.tolist())) or torch.cat([context, context], 1)
    lm.generate_until([SimpleNamespace(args=("a b c", {"until": ["z"], "max_gen_toks": 3}))], disable_tqdm=True)
    assert prompts == ["abc" if bos == "none" else "^abc"]
