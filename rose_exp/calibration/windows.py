"""Cutting texts into windows of tokens."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import RoseExpError
from .texts import Text

MAX_DRAWS_PER_WINDOW = 10_000  # documents looked at for one long enough


@dataclass(frozen=True)
class Windows:
    """Windows of equal length, and what they depend on.

    Attributes:
        tokens: (windows, length) int64.
        protocol: for the record; ``tokens_sha256`` is of the windows as they are.
    """

    tokens: Tensor
    protocol: dict[str, Any]


def contiguous_windows(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None, where: str) -> Windows:
    """The papers' evaluation windows: the joined text tokenised as a whole (so the tokenizer's start token, where it has
    one, stands once at the very start), cut side by side without overlap, the rest dropped.

    Args:
        limit: only the first so many windows; None: all.
        where: name of the setting, for errors.
    Raises:
        RoseExpError: the text is shorter than one window, or than ``limit`` windows.
    """
    tokens = _tokenise(text.joined, tokenizer)
    count = len(tokens) // length
    if count < (limit or 1):
        wanted = f"{limit} windows of {length}" if limit else f"a window of {length}"
        raise RoseExpError(
            f"{where}.window: expected a text of at least {wanted} tokens, got {len(tokens)} tokens from {text.source}"
        )
    count = limit or count
    windows = tokens[: count * length].view(count, length)
    return _windows(windows, text, {"cut": "contiguous", "text_tokens": len(tokens)})


def draw_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int,
    seed: int,
    draw: Literal["windows", "documents"],
    where: str,
) -> Windows:
    """Random calibration windows, drawn in the way, and with the generator, of the SparseGPT line of code.

    ``windows``: at random places of the joined text, which may overlap. ``documents``: a random document, passed over
    unless longer than the window, then a random place in it (C4).

    Raises:
        RoseExpError: the text is no longer than one window, or has no long enough document.
    """
    generator = random.Random(seed)
    if draw == "windows":
        tokens = _tokenise(text.joined, tokenizer)
        if len(tokens) <= length:
            raise RoseExpError(
                f"{where}.window: expected less than the text has tokens, {len(tokens)} from {text.source}, got {length}"
            )
        starts = [generator.randint(0, len(tokens) - length - 1) for _ in range(samples)]
        windows = [tokens[start : start + length] for start in starts]
    else:
        windows = [
            _draw_from_document(text, tokenizer, length, generator, where)
            for _ in tqdm(range(samples), desc="drawing documents", unit="window", disable=None, leave=False)
        ]
    return _windows(torch.stack(windows), text, {"cut": draw, "seed": seed})


def _draw_from_document(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, generator: random.Random, where: str
) -> Tensor:
    for _ in range(MAX_DRAWS_PER_WINDOW):
        tokens = _tokenise(text.documents[generator.randint(0, len(text.documents) - 1)], tokenizer)
        if len(tokens) > length:
            start = generator.randint(0, len(tokens) - length - 1)
            return tokens[start : start + length]
    raise RoseExpError(
        f"{where}.window: expected documents longer than {length} tokens, "
        f"got none in {MAX_DRAWS_PER_WINDOW} random draws from {text.source}"
    )


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def _windows(tokens: Tensor, text: Text, cut: dict[str, Any]) -> Windows:
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    counts = {"windows": len(tokens), "window": tokens.shape[1], "tokens_sha256": digest}
    return Windows(tokens, text.protocol | cut | counts)
