"""Which models need a BOS token at the start of every window."""

from __future__ import annotations

import logging

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..runtime.errors import RoseExpError
from ..settings.schema import ModelSettings
from ..settings.texts import Bos
from .loading import from_pretrained

log = logging.getLogger(__name__)

NEEDED_BY = ("gemma",)
"""Families, by a part of ``model_type``, that predict poorly from a window without BOS.

Sources: EleutherAI/lm-evaluation-harness pull requests 1465 (Gemma 7B on lambada_openai: accuracy 0.004 without BOS, 0.671
with it) and 2049 (Gemma 2), and issue 3430 (Gemma 3); ggml-org/llama.cpp pull request 21500 (Gemma 4).
"""


def needs_bos(config: PreTrainedConfig) -> bool:
    """Return whether the model, or the text model inside it, belongs to a family in :data:`NEEDED_BY`."""
    kinds = (config.model_type, config.get_text_config().model_type)
    return any(family in kind for kind in kinds for family in NEEDED_BY)


def resolve_bos(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> Bos:
    """Return what ``model.bos`` means for the model.

    Raises:
        RoseExpError: every window needs BOS, and the tokenizer has none.
    """
    bos = settings.bos
    if bos == "auto":
        bos = "windows" if needs_bos(from_pretrained(AutoConfig, settings)) else "tokenizer"
        if bos == "windows":
            log.info("every window starts with a BOS token, which %s needs (model.bos)", settings.name)
    if bos == "windows" and tokenizer.bos_token_id is None:
        meaning = "" if settings.bos == bos else f", which means {bos} for this model"
        raise RoseExpError(
            f"model.bos: expected tokenizer or none, since the tokenizer has no BOS token, got {settings.bos}{meaning}"
        )
    return bos
