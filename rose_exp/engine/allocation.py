"""How much of each layer is pruned when the layers need not lose the same share: only the share of all together is given.

Two rules. :func:`owl_shares` is that of OWL (Yin et al., 2024): blocks with more outliers among their Wanda scores keep more.
:func:`loss_shares` lets one threshold decide over all layers: a weight is worth what it is expected to lose, W²·E[x²], as a
share of its layer's output power, so that the sum of the layers' relative losses is the least that can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["owl", "losses"]
LOWEST, HIGHEST, PER_OCTAVE = -120, 40, 32  # of the base-2 logarithms of losses that are told apart, and how finely


@dataclass(frozen=True)
class BlockSurvey:
    """What the dense model shows of one block.

    Attributes:
        sizes: weights of its layers, by name.
        outliers: for ``owl``: share of the Wanda scores of all its layers together that are above a multiple of their mean.
        histograms: for ``losses``: of its layers by name, see :func:`loss_histogram`.
    """

    sizes: Mapping[str, int]
    outliers: float = 0.0
    histograms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """How the share that is pruned differs between layers.

    Args:
        rule: ``owl``, between blocks by their outliers, or ``losses``, between layers by what weights are expected to lose.
        spread: 0 to 1: by which a share differs from that of all together at most in ``losses``. In ``owl`` its authors' λ: the
            largest and the smallest share are 2λ apart, and all are shifted to meet the total.
        outlier: how many times the mean an outlier is above, in ``owl``; its authors' M.
    """

    rule: Rule
    spread: float = 0.08
    outlier: float = 5.0

    def __post_init__(self):
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread: expected a number from 0 to 1, got {self.spread}")
        if not 0 < self.outlier < float("inf"):
            raise ValueError(f"outlier: expected a finite number above 0, got {self.outlier}")

    def shares(self, blocks: Sequence[BlockSurvey], ratio: float) -> dict[str, float]:
        """The share of each layer's weights to prune, by name; of all together it is ``ratio``."""
        sizes = {name: size for block in blocks for name, size in block.sizes.items()}
        if not sizes:
            return {}
        if self.rule == "losses":
            found = loss_shares([h for block in blocks for h in block.histograms.values()], ratio, self.spread)
        else:
            outliers = [block.outliers for block in blocks for _ in block.sizes]
            found = owl_shares(outliers, list(sizes.values()), ratio, self.spread)
        return dict(zip(sizes, found, strict=True))


def outlier_share(scores: Sequence[Tensor], multiple: float) -> float:
    """The share of some scores, all taken together, that are above a multiple of their mean."""
    count = sum(s.numel() for s in scores)
    mean = sum(float(s.sum(dtype=torch.float64)) for s in scores) / count
    return sum(int((s > multiple * mean).sum()) for s in scores) / count


def loss_histogram(weight: Tensor, mean_square: Tensor, power: Tensor | float) -> Tensor:
    """How many weights are expected to lose how much: counts, int64, over the base-2 logarithm of W²·E[x²] / power.

    Args:
        weight: W, (rows, columns).
        mean_square: E[x²] of each column, (columns,).
        power: E‖W x‖², above 0.

    Raises:
        ValueError: the losses do not fit float32.
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
    """The share of each layer that is pruned, so that all layers lose weights up to the same expected loss.

    Args:
        histograms: of each layer, see :func:`loss_histogram`.
        ratio: of all weights together, 0 to 1.
        spread: by which a layer's share may differ from ``ratio`` at most.
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
    """The share of each layer that is pruned, the less the more outliers its block has: ``ratio`` ± ``spread``, shifted as the
    total asks for.

    Args:
        outliers: share of the Wanda scores of each layer's block that are above some multiple of their mean.
        sizes: weights of each layer.
        ratio: of all weights together, 0 to 1.
    """
    found = torch.tensor(outliers, dtype=torch.float64)
    width = found.max() - found.min()
    kept = (found - found.min()) * (2 * spread / width) if width > 0 else torch.zeros_like(found)
    return _exact(lambda shift: (shift - kept).clamp(0, 1), 0.0, 1.0 + 2 * spread, sizes, ratio)


def _exact(shares: Callable[[float], Tensor], low: float, high: float, sizes: Sequence[int], ratio: float) -> list[float]:
    """Shares c / n with whole counts c whose sum is that of all weights times ``ratio``, by bisection of what the shares grow
    with."""
    total, weights = int(sum(sizes) * ratio), torch.tensor(sizes, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        if float((shares(middle) * weights).sum()) < total:
            low = middle
        else:
            high = middle
    wanted = shares(high) * weights
    counts = wanted.floor()
    for layer in (wanted - counts).argsort(descending=True, stable=True).tolist():
        missing = total - counts.sum()
        counts[layer] += missing.clamp(-counts[layer], weights[layer] - counts[layer]).clamp(-1, 1)
    return [_share(int(count), size) for count, size in zip(counts.tolist(), sizes, strict=True)]


def _share(count: int, size: int) -> float:
    """The share that takes ``count`` of ``size``: one half more, so that rounding down does not lose it."""
    return min(1.0, (count + 0.5) / size) if 0 < count < size else count / size
