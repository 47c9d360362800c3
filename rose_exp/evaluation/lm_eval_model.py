"""Adapter of the pruned model to lm-eval. Importing this module imports lm-eval, which is slow."""

from __future__ import annotations

import sys
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..settings.texts import Bos


class PrunedLM(HFLM):
    """lm-eval's model, with a BOS token exactly where ``model.bos`` puts it.

    By itself, lm-eval relies on the tokenizer to add BOS. In rolling log-likelihoods, it adds a second one before the
    tokenizer's, and later windows have none (lm-evaluation-harness issues 3333 and 2382).

    Args:
        tokenizer: lm-eval may add a padding token to it.
        bos: see :data:`rose_exp.settings.texts.Bos`. Even with ``none``, lm-eval conditions the first token of a request
            without context on BOS.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int | str, bos: Bos):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bos != "none")
        self.bos = bos
        self._rolling = False  # whether lm-eval adds the prefix token itself

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        if self.bos != "windows" and not self._rolling:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        ids = self._text_tokens(string)
        if add_special_tokens is not False and not self._rolling:
            ids = [self.prefix_token_id, *ids]
        return self._truncated(ids, left_truncate_len)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.bos != "windows":
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        ids = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": ids}, padding="longest", padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())  # no progress bar in a pipe

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, every token of which is predicted once.

        lm-eval conditions the first window on the prefix token, which is BOS if the tokenizer has one, and each later window on
        the last token before it. With ``bos="windows"``, each window is conditioned on BOS alone, as for perplexity.
        """
        if self.bos != "windows":
            self._rolling = True
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self._rolling = False
        totals = [0.0] * len(requests)
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self._text_tokens(request.args[0])
            for start in range(0, len(ids), self.max_length):
                windows.append((None, [self.prefix_token_id], ids[start : start + self.max_length]))
                owners.append(owner)
        scores = self._loglikelihood_tokens(windows, disable_tqdm or not sys.stderr.isatty()) if windows else []
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        return totals

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        """Score continuations; a context that is cut to the model's length keeps its BOS if ``bos="windows"``."""
        if self.bos == "windows":
            requests = [(key, self._fitted(context, len(rest)), rest) for key, context, rest in requests]
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _fitted(self, context: list[int], continuation: int) -> list[int]:
        room = self.max_length + 1 - continuation  # the last token is only predicted
        return self._truncated(context, room) if room > 0 else context

    def _truncated(self, ids: list[int], limit: int | None) -> list[int]:
        """Return the last ``limit`` tokens, of which the first is still BOS if ``ids`` start with it."""
        if not limit or len(ids) <= limit:
            return ids
        kept = ids[len(ids) - limit :]
        return [ids[0], *kept[1:]] if ids[0] == self.prefix_token_id else kept

    def _text_tokens(self, string: str) -> list[int]:
        """Tokenize without special tokens, and drop a BOS that the string itself starts with."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        while ids[:1] == [self.prefix_token_id]:
            ids = ids[1:]
        return ids
