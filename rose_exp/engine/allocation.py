"""Sparsity allocation across layers at a fixed overall sparsity.

:func:`owl_shares` implements OWL (Yin et al., 2024): blocks with more outliers among their Wanda scores keep more weights.
:func:`loss_shares` applies one threshold to all layers. The loss of a weight is W²·E[x²] relative to its layer's output power,
so the threshold minimizes the sum of the layers' relative losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .bounds import AboveZero, Fraction, check_options

Rule = Literal["uniform", "owl", "losses"]
LOWEST, HIGHEST, PER_OCTAVE = -120, 40, 32  # range and resolution of the histograms of base-2 logarithms of losses


@dataclass(frozen=True)
class BlockSurvey:
    """Statistics of one block of the dense model.

    Attributes:
        sizes: number of weights of each layer, by name.
        outliers: for ``owl``: fraction of the Wanda scores of all layers of the block above a multiple of their mean.
        histograms: for ``losses``: the :func:`loss_histogram` of each layer, by name.
    """

    sizes: Mapping[str, int]
    outliers: float = 0.0
    histograms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """Options of the sparsity allocation across layers.

    Args:
        rule: ``uniform`` prunes all layers to the same sparsity, ``owl`` allocates between blocks by their outliers,
            ``losses`` between layers by expected losses.
        spread: from 0 to 1. ``losses``: maximum difference between a layer's sparsity and the overall one. ``owl``: λ of the
            paper; the largest and the smallest sparsity differ by 2λ, shifted to meet the overall sparsity.
        outlier: for ``owl``: M of the paper; a score is an outlier above M times the mean.
    """

    rule: Rule = "uniform"
    spread: Fraction = 0.08
    outlier: AboveZero = 5.0

    def __post_init__(self):
        check_options(self)

    def __bool__(self) -> bool:
        return self.rule != "uniform"

    def shares(self, blocks: Sequence[BlockSurvey], ratio: float) -> dict[str, float]:
        """Return the fraction of each layer's weights to prune, by name; ``ratio`` is the overall fraction."""
        sizes = {name: size for block in blocks for name, size in block.sizes.items()}
        if not sizes:
            return {}
        if self.rule == "uniform":
            return dict.fromkeys(sizes, ratio)
        if self.rule == "losses":
            shares = loss_shares([h for block in blocks for h in block.histograms.values()], ratio, self.spread)
        else:
            outliers = [block.outliers for block in blocks for _ in block.sizes]
            shares = owl_shares(outliers, list(sizes.values()), ratio, self.spread)
        return dict(zip(sizes, shares, strict=True))


def outlier_share(scores: Sequence[Tensor], multiple: float) -> float:
    """Return the fraction of all scores that exceed a multiple of their common mean."""
    count = sum(s.numel() for s in scores)
    mean = sum(float(s.sum(dtype=torch.float64)) for s in scores) / count
    return sum(int((s > multiple * mean).sum()) for s in scores) / count


def loss_histogram(weight: Tensor, mean_square: Tensor, power: Tensor | float) -> Tensor:
    """Return the histogram of expected losses: int64 counts over the base-2 logarithm of W²·E[x²] / power.

    Args:
        weight: W, (rows, columns).
        mean_square: E[x²] of each column, (columns,).
        power: E‖W x‖², above 0.

    Raises:
        ValueError: if the losses exceed the range of float32.
    """
    losses = weight.float().square() * (mean_square.float() / power)
    largest = float(losses.max())
    if not 0 < largest < math.inf:
        raise ValueError(
            f"weight, mean_square: expected losses that fit float32, got up to {largest:g} for an output power of "
            f"{float(power):g}"
        )
    places = losses.log2_().sub_(LOWEST).mul_(PER_OCTAVE).nan_to_num_(neginf=0).clamp_(0, (HIGHEST - LOWEST) * PER_OCTAVE - 1)
    return torch.bincount(places.flatten().long(), minlength=(HIGHEST - LOWEST) * PER_OCTAVE).cpu()


def loss_shares(histograms: Sequence[Tensor], ratio: float, spread: float) -> list[float]:
    """Return the fraction to prune of each layer if all layers share one threshold of the expected loss.

    Args:
        histograms: :func:`loss_histogram` of each layer.
        ratio: overall fraction to prune, from 0 to 1.
        spread: maximum difference between a layer's fraction and ``ratio``.
    """
    below = torch.stack([torch.cat([h.new_zeros(1), h.cumsum(0)]) for h in histograms]).double()  # (layers, bins + 1)
    sizes = below[:, -1]
    low, high = max(0.0, ratio - spread), min(1.0, ratio + spread)

    def shares(threshold: float) -> Tensor:
        bin = min(int(threshold), below.shape[1] - 2)
        counts = torch.lerp(below[:, bin], below[:, bin + 1], threshold - bin)
        return (counts / sizes).clamp(low, high)

    return _exact(shares, 0.0, below.shape[1] - 1.0, [int(size) for size in sizes], ratio)


def owl_shares(outliers: Sequence[float], sizes: Sequence[int], ratio: float, spread: float) -> list[float]:
    """Return the fraction to prune of each layer: lower in blocks with more outliers.

    The fractions span 2 · ``spread`` and are shifted so that the overall fraction is ``ratio``.

    Args:
        outliers: fraction of outliers among the Wanda scores of each layer's block.
        sizes: number of weights of each layer.
        ratio: overall fraction to prune, from 0 to 1.
    """
    values = torch.tensor(outliers, dtype=torch.float64)
    width = values.max() - values.min()
    kept = (values - values.min()) * (2 * spread / width) if width > 0 else torch.zeros_like(values)
    return _exact(lambda shift: (shift - kept).clamp(0, 1), 0.0, 1.0 + 2 * spread, sizes, ratio)


def _exact(shares: Callable[[float], Tensor], low: float, high: float, sizes: Sequence[int], ratio: float) -> list[float]:
    """Return fractions c / n with integer counts c that sum to ``ratio`` of all weights.

    Bisects the argument of ``shares``, which increase with it, then distributes the rounding errors.
    """
    total, weights = int(sum(sizes) * ratio), torch.tensor(sizes, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        if float((shares(middle) * weights).sum()) < total:
            low = middle
        else:
            high = middle
    exact_counts = shares(high) * weights
    counts = exact_counts.floor()
    for layer in (exact_counts - counts).argsort(descending=True, stable=True).tolist():
        missing = total - counts.sum()
        counts[layer] += missing.clamp(-counts[layer], weights[layer] - counts[layer]).clamp(-1, 1)
    return [_share(int(count), size) for count, size in zip(counts.tolist(), sizes, strict=True)]


def _share(count: int, size: int) -> float:
    """Return a fraction that selects ``count`` of ``size``; the added half keeps rounding down from losing one."""
    return min(1.0, (count + 0.5) / size) if 0 < count < size else count / size
