"""Cutting and sampling of windows from texts, and placement of BOS."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoTokenizer

from rose_exp.data import Text, contiguous_windows, draw_windows
from rose_exp.runtime.errors import RoseExpError

from .small_tokenizers import BOS, build_tokenizer, letters

MODES = ("tokenizer", "windows", "none")
WITH_BOS, SILENT, WITHOUT_BOS = build_tokenizer(), build_tokenizer(adds_bos=False), build_tokenizer(bos=None)


@pytest.fixture(scope="module")
def llama(shared):
    return AutoTokenizer.from_pretrained(shared / "data/models/stories260k-llama")


TEXT = Text([f"Once upon a time there were {i} little bears. " * (i + 1) for i in range(12)], "test", "\n\n")
ALPHABET = Text(["a b c d e f", "g h i", "j k l m n o p q r s t u v w x y z"], "test", " ")
SPELLED = Text(["<bos> a b c d e f", "<bos> g h i", "<bos> <bos> j k l m n o p q r s t u v w x y z"], "test", " ")


def cut(text, tokenizer, length, bos):
    windows = contiguous_windows(text, tokenizer, length, None, "here", bos)
    assert windows.protocol["bos"] == bos
    return [letters(window) for window in windows.tokens.tolist()]


def drawn(text, tokenizer, length, bos, draw="windows", samples=40):
    windows = draw_windows(text, tokenizer, length, samples, 0, draw, "here", bos)
    assert windows.protocol["bos"] == bos
    assert windows.tokens.shape == (samples, length)
    return [letters(window) for window in windows.tokens.tolist()]


def test_contiguous_windows_are_adjacent(llama):
    """Llama follows the published protocol: a single BOS, at the start of the text."""
    ids = llama(TEXT.joined).input_ids
    assert [i for i, token in enumerate(ids) if token == llama.bos_token_id] == [0]
    windows = contiguous_windows(TEXT, llama, 32, None, "here")
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert windows.protocol["text_tokens"] == len(ids)
    assert torch.equal(contiguous_windows(TEXT, llama, 32, 3, "here").tokens, windows.tokens[:3])


def test_drawn_windows_follow_the_published_sampling(llama):
    ids = llama(TEXT.joined).input_ids
    windows = draw_windows(TEXT, llama, 20, 6, 0, "windows", "here").tokens
    generator = random.Random(0)
    for window in windows.tolist():
        start = generator.randint(0, len(ids) - 20 - 1)
        assert window == ids[start : start + 20]


def test_documents_are_resampled_until_one_is_long_enough(llama):
    windows = draw_windows(TEXT, llama, 100, 8, 0, "documents", "here").tokens
    generator = random.Random(0)
    for window in windows.tolist():
        while True:
            ids = llama(TEXT.documents[generator.randint(0, 11)]).input_ids
            if len(ids) > 100:
                break
        start = generator.randint(0, len(ids) - 100 - 1)
        assert window == ids[start : start + 100]


def test_contiguous_windows_in_each_bos_mode():
    assert cut(ALPHABET, WITH_BOS, 9, "tokenizer") == ["^abcdefgh", "ijklmnopq", "rstuvwxyz"]
    assert cut(ALPHABET, WITH_BOS, 9, "windows") == ["^abcdefgh", "^ijklmnop", "^qrstuvwx"]
    assert cut(ALPHABET, WITH_BOS, 9, "none") == ["abcdefghi", "jklmnopqr"]
    assert cut(ALPHABET, SILENT, 9, "tokenizer") == cut(ALPHABET, SILENT, 9, "none") == ["abcdefghi", "jklmnopqr"]
    assert cut(ALPHABET, SILENT, 9, "windows") == ["^abcdefgh", "^ijklmnop", "^qrstuvwx"]
    assert cut(ALPHABET, WITHOUT_BOS, 9, "tokenizer") == cut(ALPHABET, WITHOUT_BOS, 9, "none") == ["abcdefghi", "jklmnopqr"]
    two = contiguous_windows(ALPHABET, WITH_BOS, 9, 2, "here", "windows")
    assert [letters(window) for window in two.tokens.tolist()] == ["^abcdefgh", "^ijklmnop"]
    assert (two.protocol["windows"], two.protocol["window"], two.protocol["text_tokens"]) == (2, 9, 26)


@pytest.mark.parametrize("tokenizer", [WITH_BOS, SILENT])
@pytest.mark.parametrize("draw", ["windows", "documents"])
def test_drawn_windows_in_each_bos_mode(draw, tokenizer):
    sources = ["abcdefghijklmnopqrstuvwxyz"] if draw == "windows" else ["abcdef", "ghi", "jklmnopqrstuvwxyz"]
    for window in drawn(ALPHABET, tokenizer, 9, "windows", draw):
        assert window[0] == "^"
        assert any(window[1:] in source for source in sources)
    started = [f"^{source}" if tokenizer is WITH_BOS else source for source in sources]
    windows = drawn(ALPHABET, tokenizer, 9, "tokenizer", draw)
    assert all(any(window in source for source in started) for window in windows)
    assert any("^" in window for window in windows) == (tokenizer is WITH_BOS)
    assert all(any(window in source for source in sources) for window in drawn(ALPHABET, tokenizer, 9, "none", draw))


def test_bos_modes_draw_the_same_positions():
    plain = drawn(ALPHABET, SILENT, 8, "none")
    assert [window[1:] for window in drawn(ALPHABET, SILENT, 9, "windows")] == plain


def test_window_may_span_all_but_one_token_of_the_text():
    text = Text(["a b c d"], "test", " ")
    for draw in ("windows", "documents"):
        assert drawn(text, WITH_BOS, 4, "windows", draw, samples=1) == ["^abc"]
        with pytest.raises(RoseExpError, match=r"here.window: expected .* longer than one window of 5 tokens"):
            drawn(text, WITH_BOS, 5, "windows", draw)
    assert cut(text, WITH_BOS, 5, "windows") == ["^abcd"]
    with pytest.raises(RoseExpError, match=r"here.window: expected a text of at least one window of 6 tokens, got 4 tokens"):
        cut(text, WITH_BOS, 6, "windows")


@pytest.mark.parametrize("tokenizer", [WITH_BOS, SILENT])
def test_bos_is_never_doubled(tokenizer):
    """The text already contains a literal BOS at the start of each document."""
    assert cut(SPELLED, tokenizer, 9, "windows") == cut(ALPHABET, tokenizer, 9, "windows")
    assert cut(SPELLED, tokenizer, 9, "tokenizer")[0] == "^abcdef^g"
    assert cut(SPELLED, tokenizer, 9, "none")[0] == "^abcdef^g"  # nothing is added
    for draw in ("windows", "documents"):
        windows = drawn(SPELLED, tokenizer, 9, "windows", draw)
        assert all(window.count("^") == 1 and window[0] == "^" for window in windows)
        assert windows == drawn(ALPHABET, tokenizer, 9, "windows", draw)
    spelled = Text([SPELLED.documents[0]], "test", " ")
    assert not any("^^" in window for window in drawn(spelled, tokenizer, 4, "tokenizer", "documents"))


@pytest.mark.parametrize("bos", MODES)
def test_empty_documents_are_skipped(bos):
    text = Text(["", "a b c d e", ""], "test", " ")
    assert len(drawn(text, WITH_BOS, 4, bos, "documents")) == 40


@pytest.mark.parametrize("bos", MODES)
def test_protocol_depends_on_the_seed_and_the_bos_mode(bos):
    def draw(seed, bos=bos):
        return draw_windows(ALPHABET, WITH_BOS, 9, 6, seed, "windows", "here", bos)

    assert torch.equal(draw(1).tokens, draw(1).tokens)
    assert not torch.equal(draw(1).tokens, draw(2).tokens)
    assert draw(1).protocol == draw(1).protocol
    assert draw(1).protocol["tokens_sha256"] != draw(2).protocol["tokens_sha256"]
    assert draw(1).protocol["sha256"] == draw(2).protocol["sha256"]
    assert len({draw(1, mode).protocol["tokens_sha256"] for mode in MODES}) == 3


def test_short_texts_raise_an_error(llama):
    with pytest.raises(
        RoseExpError, match=r"here.window: expected a text of at least one window of 99999 tokens, got \d+ tokens"
    ):
        contiguous_windows(TEXT, llama, 99999, None, "here")
    with pytest.raises(RoseExpError, match=r"expected a text of at least 1000 windows of 20 tokens, got \d+ tokens from test"):
        contiguous_windows(TEXT, llama, 20, 1000, "here")
    with pytest.raises(
        RoseExpError, match=r"here.window: expected a text longer than one window of 99999 tokens, got \d+ tokens"
    ):
        draw_windows(TEXT, llama, 99999, 1, 0, "windows", "here")
    with pytest.raises(RoseExpError, match=r"here.window: expected a document longer than one window of 5000 tokens, got none"):
        draw_windows(TEXT, llama, 5000, 1, 0, "documents", "here")


def test_small_tokenizers_have_the_expected_bos():
    assert [t("a b").input_ids[0] == BOS for t in (WITH_BOS, SILENT, WITHOUT_BOS)] == [True, False, False]
    assert [t.bos_token_id for t in (WITH_BOS, SILENT, WITHOUT_BOS)] == [0, 0, None]
