"""Encoding of texts. The token IDs of long texts are cached, because encoding takes seconds."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..runtime.cache import cached
from ..runtime.outside import outside_errors

LONG = 100_000  # characters; shorter texts are encoded faster than a cache entry is read
LIBRARIES = ("transformers", "tokenizers")
FILE = "tokens.npy"


def encode(text: str, tokenizer: PreTrainedTokenizerBase, special: bool, where: str) -> Tensor:
    """Return the token IDs of a text, (tokens,) int64.

    Args:
        special: whether the tokenizer adds its special tokens.
        where: name of the text's settings, for errors.
    Raises:
        RoseExpError: the tokenizer cannot encode the text.
    """
    if len(text) < LONG or not _is_known(tokenizer):
        return _encode(text, tokenizer, special, where)

    def fill(folder: Path) -> None:
        numpy.save(folder / FILE, _encode(text, tokenizer, special, where).numpy(), allow_pickle=False)

    facts = {"text": text, "tokenizer": tokenizer.backend_tokenizer.to_str()}
    key = {name: hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest() for name, value in facts.items()}
    key |= {"class": type(tokenizer).__name__, "special": special, "split": getattr(tokenizer, "split_special_tokens", None)}
    entry = cached("tokens", key | {name: importlib.metadata.version(name) for name in LIBRARIES}, fill, 8 * len(text))
    if entry is None:
        return _encode(text, tokenizer, special, where)
    return torch.from_numpy(numpy.load(entry / FILE, allow_pickle=False))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, special: bool, where: str) -> Tensor:
    with outside_errors(f"{where}: the model's tokenizer cannot encode the text"):
        return torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False).input_ids, dtype=torch.int64)


def _is_known(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the serialized tokenizer and its class determine the result: not for code of other packages."""
    return tokenizer.is_fast and type(tokenizer).__module__.partition(".")[0] == "transformers"
