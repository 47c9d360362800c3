"""Perplexity with the protocol of the pruning papers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..runtime import signals as interruption
from ..runtime.batches import batch_size
from ..runtime.errors import RoseExpError
from ..runtime.ranks import Ranks
from .divergence import Around, Comparison, Divergence


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with its standard error.

    Attributes:
        value: exp of the mean over windows.
        standard_error: standard error of ``value``, from the spread of the windows' means (delta method); 0 for one window.
        windows: mean negative log-likelihood of each window.
        divergence: divergence from the dense model, if it is compared.
    """

    value: float
    standard_error: float
    windows: Sequence[float]
    divergence: Divergence | None = None


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    batch: int = 1,
    name: str = "perplexity",
    ranks: Ranks | None = None,
    answers: Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]] | None = None,
    comparison: Comparison | None = None,
) -> Perplexity:
    """Return exp of the mean negative log-likelihood of tokens, averaged within windows and then over windows.

    Windows are independent: no context carries over. The first token of a window has no context and does not count.
    SparseGPT, Wanda and ROSE use the same protocol.

    Args:
        model: a causal language model, on the device to run on.
        tokens: (windows, length) int64.
        batch: windows per forward pass on a GPU, see :func:`rose_exp.runtime.batches.batch_size`.
        ranks: processes that share the windows, each with a copy of the model; if None, a single process.
        answers: function that yields batches of windows and their logits, to replace the forward pass of the whole model. With
            a comparison, it computes them inside :meth:`Comparison.both`.
        comparison: comparison with the dense model, for the windows of this process.

    Raises:
        RoseExpError: the logits contain NaN or infinity.
    """
    ranks = ranks or Ranks()
    share = ranks.share(tokens)
    size = batch_size(batch, next(model.parameters()).device)
    around = nullcontext if comparison is None else comparison.both
    pairs = answers(share) if answers is not None else whole_answers(model, share, size, around)
    means: list[float] = []  # negative log-likelihood per window
    for windows, logits in tqdm(pairs, name, -(-len(share) // size), unit="batch", disable=None, leave=False):
        interruption.check()
        following = windows[:, 1:].to(logits.device)
        own = logits[: len(windows), :-1]
        for scores, targets in zip(own, following, strict=True):  # one window at a time, because logits are large
            means.append(float(functional.cross_entropy(scores.float(), targets)))
        for scores, dense in zip(own, logits[len(windows) :, :-1], strict=True) if comparison is not None else ():
            comparison.add(scores, dense)
    means = [value for rank_means in ranks.gather(means) for value in rank_means]
    divergence = None
    if comparison is not None:
        divergence = Divergence.over([pair for rank_pairs in ranks.gather(comparison.windows) for pair in rank_pairs])
    mean = sum(means) / len(means)
    if not math.isfinite(mean):
        raise RoseExpError(f"{name}: expected finite predictions, got a mean negative log-likelihood of {mean}")
    if mean >= 700:
        return Perplexity(math.inf, math.inf, means, divergence)
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return Perplexity(math.exp(mean), math.exp(mean) * spread / math.sqrt(len(means)), means, divergence)


def whole_answers(
    model: nn.Module, tokens: Tensor, batch: int, around: Around = nullcontext
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of windows and their logits, computed by the whole model.

    Args:
        around: context in which the model runs.
    """
    device = next(model.parameters()).device
    for windows in tokens.split(batch) if len(tokens) else ():
        with around():
            logits = model(input_ids=windows.to(device), use_cache=False).logits
        yield windows, logits
