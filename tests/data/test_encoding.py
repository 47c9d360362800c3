"""Cached token IDs are equal to those of the tokenizer, for every tokenizer and text."""

from __future__ import annotations

import pytest
import torch

from rose_exp.data import encoding
from rose_exp.data.encoding import encode

from .small_tokenizers import build_tokenizer

TEXT = "a b c <bos> d e <eos> zz\n" * 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "LONG", 100)


def tokenizers() -> list:
    """Tokenizers that encode the text differently."""
    split = build_tokenizer()
    split.split_special_tokens = True
    added = build_tokenizer()
    added.add_tokens(["zz"])
    return [build_tokenizer(), build_tokenizer(adds_bos=False), build_tokenizer(bos=None), split, added]


def test_cached_tokens_are_those_of_the_tokenizer(monkeypatch):
    cases = [(text, number, special) for text in (TEXT, TEXT + "a") for number in range(5) for special in (True, False)]
    expected = [encoding._encode(text, tokenizers()[number], special, "calibration") for text, number, special in cases]
    for _ in range(2):
        for (text, number, special), tokens in zip(cases, expected, strict=True):
            found = encode(text, tokenizers()[number], special, "calibration")
            assert found.dtype == torch.int64
            assert torch.equal(found, tokens)
    monkeypatch.setattr(encoding, "_encode", None)  # everything is in the cache
    assert torch.equal(encode(TEXT, tokenizers()[0], True, "calibration"), expected[0])


def test_short_texts_and_foreign_tokenizers_are_not_cached(tmp_path):
    class Foreign(type(build_tokenizer())):
        pass

    tokenizer = build_tokenizer()
    encode("a b", tokenizer, True, "calibration")
    tokenizer.__class__ = Foreign
    encode(TEXT, tokenizer, True, "calibration")
    assert not (tmp_path / "cache").exists()
