"""Perplexity in the protocol of the pruning papers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..runtime import signals as interruption
from ..runtime.batches import at_once
from ..runtime.errors import RoseExpError
from ..runtime.ranks import Ranks


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        value: exp of the mean over windows.
        standard_error: of the value, from the spread of the windows' own means (delta method); 0 for a single window.
    """

    value: float
    standard_error: float


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    batch: int = 1,
    name: str = "perplexity",
    ranks: Ranks | None = None,
    answers: Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]] | None = None,
) -> Perplexity:
    """exp of the mean over windows of the mean negative log-likelihood of each window's tokens but its first.

    Each window is read on its own: its first token is predicted from nothing, so it does not count, and nothing is
    carried over from the window before (SparseGPT, Wanda and ROSE do the same).

    Args:
        model: a causal language model, on the device to run on.
        tokens: (windows, length) int64.
        batch: windows at once, on a GPU; see :func:`rose_exp.runtime.batches.at_once`.
        ranks: the processes that share the windows, each with the model; None: this one alone.
        answers: gives batches of windows and their logits in another way than by running the whole model.

    Raises:
        RoseExpError: the model answers with NaN or infinity.
    """
    ranks = ranks or Ranks()
    own = ranks.share(tokens)
    size = at_once(batch, next(model.parameters()).device)
    pairs = answers(own) if answers is not None else _answers(model, own, size)
    means: list[float] = []  # of the negative log-likelihood, a window
    for windows, logits in tqdm(pairs, name, -(-len(own) // size), unit="batch", disable=None, leave=False):
        interruption.check()
        following = windows[:, 1:].to(logits.device)
        for scores, targets in zip(logits[:, :-1], following, strict=True):  # one at a time: logits are large
            means.append(float(functional.cross_entropy(scores.float(), targets)))
    means = [value for of_rank in ranks.gather(means) for value in of_rank]
    mean = sum(means) / len(means)
    if not math.isfinite(mean):
        raise RoseExpError(f"{name}: the model's predictions are not finite (mean negative log-likelihood {mean})")
    if mean >= 700:
        return Perplexity(math.inf, math.inf)
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return Perplexity(math.exp(mean), math.exp(mean) * spread / math.sqrt(len(means)))


def _answers(model: nn.Module, tokens: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for windows in tokens.split(batch) if len(tokens) else ():
        yield windows, model(input_ids=windows.to(device), use_cache=False).logits
