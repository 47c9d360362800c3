"""Perplexity in the protocol of the pruning papers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..errors import RoseExpError
from ..ranks import Ranks


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, batch: int = 1, name: str = "perplexity", ranks: Ranks | None = None) -> float:
    """exp of the mean over windows of the mean negative log-likelihood of each window's tokens but its first.

    Each window is read on its own: its first token is predicted from nothing, so it does not count, and nothing is
    carried over from the window before (SparseGPT, Wanda and ROSE do the same).

    Args:
        model: a causal language model, on the device to run on.
        tokens: (windows, length) int64.
        batch: windows at once.
        ranks: the processes that share the windows, each with the model; None: this one alone.

    Raises:
        RoseExpError: the model answers with NaN or infinity.
    """
    device = next(model.parameters()).device
    ranks = ranks or Ranks()
    total = 0.0
    for windows in tqdm(ranks.share(tokens).split(batch), desc=name, unit="batch", disable=None, leave=False):
        windows = windows.to(device)
        logits = model(input_ids=windows, use_cache=False).logits
        for scores, targets in zip(logits[:, :-1], windows[:, 1:], strict=True):  # one at a time: logits are large
            total += float(functional.cross_entropy(scores.float(), targets))
    mean = ranks.total(total) / len(tokens)
    if not math.isfinite(mean):
        raise RoseExpError(f"{name}: the model's predictions are not finite (mean negative log-likelihood {mean})")
    return math.exp(mean) if mean < 700 else math.inf
