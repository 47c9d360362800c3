"""DSnoT (Zhang et al., 2024): regrows and prunes weights of an initial mask to cancel the mean output error, without updates.

For each row the expected output error is e = Σ W·E[x] over its pruned weights. Each cycle regrows the pruned
weight that reduces e most relative to the variance of its input, and prunes a kept weight of low Wanda score whose removal
moves e towards zero. The authors sum over a calibration sequence of 2048 tokens; the threshold keeps that scale here,
regardless of the number and length of the sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from ..bounds import Count
from ..footprint import Working
from ..hessian import Factor
from ..patterns import SemiStructured, Sparsity
from .base import Layer, Method, Solution, drop

LARGEST_SHARE = 0.25  # of the kept weights of a row that cycles can replace without a concern
SEQUENCE_LENGTH = 2048  # tokens over which the authors sum the error that update_threshold is compared with


@dataclass(frozen=True)
class DSnoT(Method):
    """DSnoT with the defaults of the authors' code and example.

    Args:
        initial: source of the initial mask: ``wanda``, ``magnitude``, or ``sparsegpt`` (saliency
            (w / Uⱼⱼ)² without updates, compared within each row; the start of the ROSE paper's baseline).
        max_cycles: maximum number of cycles; each swaps one weight per row.
        update_threshold: a row stops once its absolute error is at most this value.
        variance_power: exponent of the input variance that divides the benefit of regrowing a weight; 0 ignores it.
        same_sign: whether a row stops before its error changes sign; if None, only for N:M, as in the authors' code.
    """

    initial: Literal["wanda", "magnitude", "sparsegpt"] = "wanda"
    max_cycles: Count = 50
    update_threshold: Annotated[float, Ge(0)] = 0.1
    variance_power: Annotated[float, Ge(0)] = 1.0
    same_sign: bool | None = None

    def concern(self, columns: int, sparsity: Sparsity) -> str | None:
        """Return a concern about rows in which the cycles can replace a large part of the mask.

        The authors' number of cycles is for layers of 4096 columns or more, in which it replaces a few percent. The cycles
        reduce only the mean error. In narrow layers, they replace most of the initial mask, and the result is much worse.
        """
        kept = float(columns * (1 - sparsity.ratio))
        if self.max_cycles <= LARGEST_SHARE * kept:
            return None
        return (
            f"{self.max_cycles} cycles can replace more than {LARGEST_SHARE:.0%} of the {kept:.0f} kept weights of a row; "
            "lower method.options.max_cycles"
        )

    @property
    def retained(self) -> Working:
        return Working(squares=1 if self.initial == "sparsegpt" else 0)

    def working(self, sparsity: Sparsity) -> tuple[Working, ...]:
        squares = 2 if self.initial == "sparsegpt" else 1
        selecting, cycles = (1, 6) if isinstance(sparsity, SemiStructured) else (4.25, 11.3)
        return (Working(squares, kept=1.25, largest=cycles if self.max_cycles else selecting),)

    def prune(self, layer: Layer) -> Solution:
        metric, factor = self._initial_metric(layer)
        mask = layer.sparsity.select_by_row(metric)
        if self.max_cycles and mask.any() and not mask.all():
            mask = self._grow_and_prune(layer, metric, mask)
        return Solution(drop(layer.weight, mask), mask, factor)

    def _initial_metric(self, layer: Layer) -> tuple[Tensor, Factor | None]:
        if self.initial != "sparsegpt":
            return layer.scores(self.initial), None
        saliency = (layer.weight / layer.factor.upper.diagonal()).square().masked_fill(layer.dead, 0)
        return saliency, layer.factor

    def _grow_and_prune(self, layer: Layer, metric: Tensor, mask: Tensor) -> Tensor:
        grouped = isinstance(layer.sparsity, SemiStructured)
        same_sign = grouped if self.same_sign is None else self.same_sign
        mean = layer.moments.mean().to(layer.weight)
        variance = layer.moments.variance().to(layer.weight)
        effect = layer.weight * mean * SEQUENCE_LENGTH  # contribution to the error if pruned, (rows, columns)
        error = (effect * mask).sum(dim=1)  # (rows,)
        first_sign = error.sign()
        limits = torch.finfo(variance.dtype)
        spread = variance.clamp_min(limits.tiny).pow(self.variance_power).clamp_min_(limits.tiny)
        benefit = (effect / spread).clamp_(limits.min, limits.max)  # constant inputs have the largest benefit
        threshold = min(self.update_threshold * 2.0**layer.shift, limits.max)
        candidates = _Candidates(benefit, mask)
        if grouped:
            victims = _GroupVictims(metric, mask, layer.sparsity.group)
        else:
            victims = _RowVictims(layer.scores("wanda"), effect, mask)

        mask = mask.clone()
        rows = torch.arange(len(mask), device=mask.device)
        active = torch.ones_like(error, dtype=torch.bool)
        for _ in range(self.max_cycles):
            active &= error.abs() > threshold
            grown, can_grow = candidates.next(error > 0)
            pruned, can_prune = victims.next(error > 0, grown)
            after = error + effect[rows, pruned] - effect[rows, grown]
            if same_sign:
                active &= (after.sign() == first_sign) | ~can_prune
            active &= can_grow
            swap = active & can_prune
            mask[rows[swap], grown[swap]] = False
            mask[rows[swap], pruned[swap]] = True
            victims.take(rows[swap], pruned[swap])
            error = torch.where(swap, after, error)
            if not active.any():
                break
        return mask


class _Candidates:
    """Pruned weights to regrow: largest benefit first for a positive error, smallest first for a negative one."""

    def __init__(self, benefit: Tensor, mask: Tensor):
        self.count = mask.sum(dim=1)
        self.order = benefit.masked_fill(~mask, torch.inf).argsort(dim=1, stable=True)  # the pruned ones come first
        self.low = torch.zeros_like(self.count)
        self.high = self.count - 1

    def next(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        available = self.low <= self.high
        place = torch.where(positive, self.high, self.low).clamp(0, self.order.shape[1] - 1)
        self.high = self.high - positive.long()
        self.low = self.low + (~positive).long()
        return self.order.gather(1, place[:, None])[:, 0], available


class _RowVictims:
    """Kept weights to prune, in any column: those that move the error towards zero, lowest Wanda score first."""

    def __init__(self, scores: Tensor, effect: Tensor, mask: Tensor):
        self.lists = {}
        for positive in (True, False):
            fitting = ~mask & ((effect < 0) if positive else (effect > 0))
            order = scores.masked_fill(~fitting, torch.inf).argsort(dim=1, stable=True)
            self.lists[positive] = (
                order,
                fitting.sum(dim=1),
                torch.zeros(len(mask), dtype=torch.int64, device=mask.device),
            )

    def next(self, positive: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        chosen, available = [], []
        for sign, (order, count, place) in self.lists.items():
            selected = positive if sign else ~positive
            chosen.append(order.gather(1, place.clamp_max(order.shape[1] - 1)[:, None])[:, 0])
            available.append(place < count)
            place += selected.long()
        return torch.where(positive, *chosen), torch.where(positive, *available)

    def take(self, rows: Tensor, columns: Tensor) -> None:
        """Do nothing: :meth:`next` advances the positions."""


class _GroupVictims:
    """Kept weights to prune, in the group of the regrown one: the smallest initial metric not used yet."""

    def __init__(self, metric: Tensor, mask: Tensor, group: int):
        columns = metric.shape[1]
        padding = -columns % group
        self.group = group
        self.metric = torch.nn.functional.pad(metric.masked_fill(mask, torch.inf), (0, padding), value=torch.inf)

    def next(self, positive: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        start = grown - grown % self.group
        columns = start[:, None] + torch.arange(self.group, device=grown.device)
        smallest, place = self.metric.gather(1, columns).min(dim=1)
        possible = smallest < torch.inf
        return torch.where(possible, start + place, grown), possible

    def take(self, rows: Tensor, columns: Tensor) -> None:
        self.metric[rows, columns] = torch.inf
