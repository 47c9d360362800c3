"""Divergence of a pruned model's predictions from those of the dense model.

The dense model's predictions are kept as the inputs of its output layer, which are much smaller than its logits. Pruning does
not change the output layer, so it computes the logits of both models.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..runtime import signals as interruption
from ..runtime.errors import RoseExpError

POSITIONS = 128  # compared at a time, because each has a probability for the whole vocabulary

Around = Callable[[], AbstractContextManager[Any]]
"""Returns the context in which the logits of a batch are computed."""

Answers = Callable[[Around], Iterable[tuple[Tensor, Tensor]]]
"""Yields batches of windows and their logits."""


@dataclass(frozen=True)
class Divergence:
    """How the predictions of a pruned model differ from those of the dense model.

    Means over positions within windows, then over windows, with standard errors from the spread of the windows' means.

    Attributes:
        kl: Kullback-Leibler divergence Σ p log(p/q) in nats, of the pruned model's next-token distribution q from the dense
            model's p.
        agreement: fraction of positions where both models have the same most likely token.
        kl_windows, agreement_windows: means of each window.
    """

    kl: float
    kl_standard_error: float
    agreement: float
    agreement_standard_error: float
    kl_windows: Sequence[float]
    agreement_windows: Sequence[float]

    @classmethod
    def over(cls, windows: Sequence[tuple[float, float]]) -> Divergence:
        """Return the divergence over windows, given the mean divergence and agreement of each."""
        kl, agreement = zip(*windows, strict=True)
        return cls(*_mean_and_error(kl), *_mean_and_error(agreement), kl, agreement)


def output_layer(model: nn.Module) -> nn.Module:
    """Return the layer that computes a model's logits.

    Raises:
        RoseExpError: the model has none.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise RoseExpError(f"evaluation.divergence: expected a model with an output layer, got {type(model).__name__}")
    return layer


@torch.no_grad()
def dense_states(model: nn.Module, answers: Answers, batches: int, name: str) -> Tensor:
    """Return the inputs of the dense model's output layer for all windows, (windows, length, width), on the CPU.

    Args:
        batches: number of batches, for the progress bar.
        name: name of the progress bar.
    Raises:
        RoseExpError: the output layer is not called once with the hidden states of all positions of a batch.
    """
    layer, found = output_layer(model), []

    def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].cpu() if args else None)

    pairs = answers(lambda: layer.register_forward_pre_hook(record))
    for done, (windows, _) in enumerate(tqdm(pairs, name, batches, unit="batch", disable=None, leave=False), 1):
        interruption.check()
        if len(found) != done or found[-1] is None or found[-1].shape[:-1] != windows.shape:
            raise RoseExpError(
                f"evaluation.divergence: expected a model that calls its output layer once for all positions of a batch, got "
                f"{type(model).__name__}"
            )
    return torch.cat(found) if found else torch.empty(0)


class Comparison:
    """Compares a model with the dense model, while its perplexity is measured.

    Args:
        states: see :func:`dense_states`, for the windows of this process.
    """

    def __init__(self, model: nn.Module, states: Tensor):
        self.layer, self.states = output_layer(model), states
        self.position = 0
        self.windows: list[tuple[float, float]] = []  # mean divergence and agreement

    def both(self) -> AbstractContextManager[Any]:
        """Return a context in which the model returns the dense model's logits of a batch after its own, in one tensor."""
        return self.layer.register_forward_hook(self._append)

    def _append(self, layer: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        states = self.states[self.position : self.position + len(logits)]
        self.position += len(logits)
        return torch.cat([logits, layer.forward(states.to(args[0]))])  # in two products: a larger one may round differently

    def add(self, logits: Tensor, dense: Tensor) -> None:
        """Compare the logits of one window, (positions, vocabulary)."""
        kl, same = 0.0, 0
        for scores, dense_scores in zip(logits.split(POSITIONS), dense.split(POSITIONS), strict=True):
            log_p, log_q = (functional.log_softmax(x.float(), dim=-1) for x in (dense_scores, scores))
            terms = log_p.exp() * (log_p - log_q)
            kl += float(terms.masked_fill_(log_p.isneginf(), 0).sum(dtype=torch.float64))
            same += int((scores.argmax(dim=-1) == dense_scores.argmax(dim=-1)).sum())
        self.windows.append((kl / len(logits), same / len(logits)))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
    return statistics.fmean(values), spread / math.sqrt(len(values))
