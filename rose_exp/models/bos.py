"""Which models need a BOS token at the start of every window."""

from __future__ import annotations

import logging

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..runtime.errors import RoseExpError
from ..settings.schema import ModelSettings
from ..settings.texts import Bos
from .families import families
from .loading import from_pretrained

log = logging.getLogger(__name__)


def needs_bos(config: PreTrainedConfig) -> bool:
    """Return whether the model, or the text model inside it, belongs to a family that predicts poorly without BOS."""
    return any(family.bos and family.matches(config) for family in families())


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
    return checked_bos(bos, settings, tokenizer)


def checked_bos(bos: Bos, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> Bos:
    """Return ``bos``, the meaning of ``model.bos`` for the model.

    Raises:
        RoseExpError: every window needs BOS, and the tokenizer has none.
    """
    if bos == "windows" and tokenizer.bos_token_id is None:
        meaning = "" if settings.bos == bos else f", which means {bos} for this model"
        raise RoseExpError(
            f"model.bos: expected tokenizer or none, since the tokenizer has no BOS token, got {settings.bos}{meaning}"
        )
    return bos
