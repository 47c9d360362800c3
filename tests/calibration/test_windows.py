"""Texts and the windows cut from them."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoTokenizer

from rose_exp.calibration import Text, contiguous_windows, draw_windows, load_text
from rose_exp.errors import RoseExpError
from rose_exp.text_settings import TextSettings


@pytest.fixture(scope="module")
def tokenizer(shared):
    return AutoTokenizer.from_pretrained(shared / "data/models/stories260k-llama")


TEXT = Text([f"Once upon a time there were {i} little bears. " * (i + 1) for i in range(12)], "test", "\n\n")


def test_contiguous_windows_are_the_whole_side_by_side(tokenizer):
    ids = tokenizer(TEXT.joined).input_ids
    windows = contiguous_windows(TEXT, tokenizer, 32, None, "here")
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert windows.protocol["text_tokens"] == len(ids)
    first = contiguous_windows(TEXT, tokenizer, 32, 3, "here")
    assert torch.equal(first.tokens, windows.tokens[:3])


def test_drawn_windows_follow_the_papers_generator(tokenizer):
    ids = tokenizer(TEXT.joined).input_ids
    windows = draw_windows(TEXT, tokenizer, 20, 6, 0, "windows", "here").tokens
    generator = random.Random(0)
    for window in windows.tolist():
        start = generator.randint(0, len(ids) - 20 - 1)
        assert window == ids[start : start + 20]


def test_windows_of_documents_come_from_long_documents_only(tokenizer):
    windows = draw_windows(TEXT, tokenizer, 100, 8, 0, "documents", "here").tokens
    generator = random.Random(0)
    for window in windows.tolist():
        while True:
            ids = tokenizer(TEXT.documents[generator.randint(0, 11)]).input_ids
            if len(ids) > 100:
                break
        start = generator.randint(0, len(ids) - 100 - 1)
        assert window == ids[start : start + 100]


def test_the_seed_decides_and_the_fingerprint_tells(tokenizer):
    draw = lambda seed: draw_windows(TEXT, tokenizer, 20, 6, seed, "windows", "here")  # noqa: E731
    assert torch.equal(draw(1).tokens, draw(1).tokens)
    assert not torch.equal(draw(1).tokens, draw(2).tokens)
    assert draw(1).protocol == draw(1).protocol
    assert draw(1).protocol["tokens_sha256"] != draw(2).protocol["tokens_sha256"]
    assert draw(1).protocol["sha256"] == draw(2).protocol["sha256"]


def test_texts_that_are_too_short_are_told(tokenizer):
    with pytest.raises(
        RoseExpError, match=r"here.window: expected a text of at least a window of 99999 tokens, got \d+ tokens"
    ):
        contiguous_windows(TEXT, tokenizer, 99999, None, "here")
    with pytest.raises(RoseExpError, match=r"expected a text of at least 1000 windows of 20 tokens"):
        contiguous_windows(TEXT, tokenizer, 20, 1000, "here")
    with pytest.raises(RoseExpError, match=r"here.window: expected less than the text has tokens, \d+ from test, got 99999"):
        draw_windows(TEXT, tokenizer, 99999, 1, 0, "windows", "here")
    with pytest.raises(RoseExpError, match=r"here.window: expected documents longer than 5000 tokens, got none"):
        draw_windows(TEXT, tokenizer, 5000, 1, 0, "documents", "here")


def test_wikitext2_has_the_papers_count_of_documents(shared, tokenizer):
    text = load_text(TextSettings(path=str(shared / "data/text/wikitext2_raw_test.jsonl")), "c")
    assert len(text.documents) == 4358
    windows = contiguous_windows(text, tokenizer, 256, 40, "c")
    assert windows.tokens.shape == (40, 256)
