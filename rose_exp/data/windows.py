"""Cut texts into windows of tokens."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..runtime.errors import RoseExpError
from ..settings.texts import Bos
from .encoding import encode
from .texts import Text

MAX_DRAWS_PER_WINDOW = 10_000  # limit of the search for a long enough document


@dataclass(frozen=True)
class Windows:
    """Windows of equal length, with their provenance.

    Attributes:
        tokens: (windows, length) int64.
        protocol: recorded with the run; ``tokens_sha256`` is that of ``tokens``.
    """

    tokens: Tensor
    protocol: dict[str, Any]


def contiguous_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None,
    where: str,
    bos: Bos = "tokenizer",
) -> Windows:
    """Cut the joined text into adjacent windows without overlap, as the papers do for evaluation, and drop the rest.

    The text is tokenized as a whole: with ``bos="tokenizer"``, BOS stands at the start of the first window only.

    Args:
        length: tokens per window, BOS included.
        limit: number of windows to keep; if None, all windows.
        where: name of the text's settings, for errors.
        bos: where a BOS token stands, see :data:`rose_exp.settings.texts.Bos`.

    Raises:
        RoseExpError: the text is shorter than one window, or than ``limit`` windows.
    """
    tokens = _tokenize(text.joined, tokenizer, bos, where)
    width = _text_tokens(length, bos)
    count = len(tokens) // width
    if count < (limit or 1):
        required = f"{limit} windows" if limit else "one window"
        raise RoseExpError(
            f"{where}.window: expected a text of at least {required} of {length} tokens, "
            f"got {len(tokens)} tokens from {text.source}"
        )
    count = limit or count
    windows = tokens[: count * width].view(count, width)
    return _windows(windows, text, tokenizer, bos, {"cut": "contiguous", "text_tokens": len(tokens)})


def draw_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int,
    seed: int,
    draw: Literal["windows", "documents"],
    where: str,
    bos: Bos = "tokenizer",
) -> Windows:
    """Draw random calibration windows with the procedure and the generator of the released SparseGPT code.

    Args:
        length: tokens per window, BOS included.
        draw: ``windows``: at random places of the joined text; windows may overlap. ``documents``: a random document, redrawn
            until it is longer than the window, then a random place in it (the papers' use of C4).
        where: name of the text's settings, for errors.
        bos: where a BOS token stands, see :data:`rose_exp.settings.texts.Bos`.

    Raises:
        RoseExpError: the text or every document drawn is too short.
    """
    generator = random.Random(seed)
    width = _text_tokens(length, bos)
    if draw == "windows":
        tokens = _tokenize(text.joined, tokenizer, bos, where)
        if len(tokens) <= width:
            raise RoseExpError(
                f"{where}.window: expected a text longer than one window of {length} tokens, "
                f"got {len(tokens)} tokens from {text.source}"
            )
        windows = [_draw(tokens, width, generator) for _ in range(samples)]
    else:
        windows = [
            _draw_from_document(text, tokenizer, length, generator, where, bos)
            for _ in tqdm(range(samples), desc="drawing documents", unit="window", disable=None, leave=False)
        ]
    return _windows(torch.stack(windows), text, tokenizer, bos, {"cut": draw, "seed": seed})


def _draw_from_document(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, generator: random.Random, where: str, bos: Bos
) -> Tensor:
    width = _text_tokens(length, bos)
    for _ in range(MAX_DRAWS_PER_WINDOW):
        tokens = _tokenize(text.documents[generator.randint(0, len(text.documents) - 1)], tokenizer, bos, where)
        if len(tokens) > width:
            return _draw(tokens, width, generator)
    raise RoseExpError(
        f"{where}.window: expected a document longer than one window of {length} tokens, "
        f"got none in {MAX_DRAWS_PER_WINDOW} random draws from {text.source}"
    )


def _draw(tokens: Tensor, width: int, generator: random.Random) -> Tensor:
    start = generator.randint(0, len(tokens) - width - 1)
    return tokens[start : start + width]


def _text_tokens(length: int, bos: Bos) -> int:
    """Return how many tokens of a window come from the text."""
    return length - 1 if bos == "windows" else length


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, bos: Bos, where: str) -> Tensor:
    """Return the token ids of ``text``, (tokens,) int64.

    Tokenizers turn a BOS token that is spelled out in the text into its id. With ``bos="windows"`` all of these are dropped, so
    that a window holds one BOS. With ``bos="tokenizer"``, one at the start replaces the tokenizer's own.
    """
    ids = encode(text, tokenizer, bos == "tokenizer", where)
    start = tokenizer.bos_token_id
    if start is None or bos == "none":
        return ids
    if bos == "windows":
        return ids[ids != start]
    return ids[1:] if ids[:2].tolist() == [start, start] else ids


def _windows(tokens: Tensor, text: Text, tokenizer: PreTrainedTokenizerBase, bos: Bos, cut: dict[str, Any]) -> Windows:
    """Prepend BOS to the rows of text tokens if every window starts with it, and describe the windows."""
    if bos == "windows":
        tokens = torch.cat([tokens.new_full((len(tokens), 1), tokenizer.bos_token_id), tokens], dim=1)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    counts = {"windows": len(tokens), "window": tokens.shape[1], "tokens_sha256": digest}
    return Windows(tokens, text.protocol | cut | {"bos": bos} | counts)
