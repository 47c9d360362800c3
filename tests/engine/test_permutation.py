"""Channel permutation that maximizes the scores kept by an N:M pattern."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from rose_exp.engine import SemiStructured
from rose_exp.engine.permutation import channel_order


def kept(scores, sparsity):
    return float(scores.masked_fill(sparsity.select(scores), 0).sum())


def best_of_two_groups(scores, sparsity):
    """Try all splits of eight channels into two groups."""
    channels = scores.shape[1]
    return max(
        kept(scores[:, [*first, *(c for c in range(channels) if c not in first)]], sparsity)
        for first in combinations(range(channels), sparsity.group)
    )


@pytest.mark.parametrize("sparsity", [SemiStructured(2, 4), SemiStructured(1, 4), SemiStructured(3, 4)], ids=str)
def test_permutation_is_close_to_the_optimum(sparsity):
    natural, found, best = 0.0, 0.0, 0.0
    for seed in range(30):
        torch.manual_seed(seed)
        scores = torch.randn(12, 8).square() * torch.rand(8).square()
        natural += kept(scores, sparsity)
        found += kept(scores[:, channel_order(scores, sparsity)], sparsity)
        best += best_of_two_groups(scores, sparsity)
    assert best >= found >= natural + 0.8 * (best - natural)


@pytest.mark.parametrize(("sparsity", "channels"), [(SemiStructured(2, 4), 40), (SemiStructured(4, 8), 43)])
def test_permutation_covers_all_channels_and_keeps_more(sparsity, channels):
    torch.manual_seed(0)
    scores = torch.randn(20, channels).square()
    order = channel_order(scores, sparsity)
    assert sorted(order.tolist()) == list(range(channels))
    whole = channels - channels % sparsity.group
    assert order[whole:].tolist() == list(range(whole, channels))  # the incomplete last group stays in place
    assert kept(scores[:, order], sparsity) > kept(scores, sparsity)


def test_large_channels_are_distributed_across_groups():
    scores = torch.ones(5, 16)
    scores[:, :8] = 10.0  # two entire groups, which would lose half of their scores
    order = channel_order(scores, SemiStructured(2, 4))
    assert ((order < 8).view(4, 4).sum(dim=1) == 2).all()
    assert kept(scores[:, order], SemiStructured(2, 4)) == 5 * 8 * 10.0


@pytest.mark.parametrize("sparsity", [SemiStructured(0, 4), SemiStructured(4, 4), SemiStructured(2, 32)], ids=str)
def test_natural_order_is_kept_if_no_other_is_better(sparsity):
    assert channel_order(torch.rand(4, 32), sparsity).tolist() == list(range(32))
    assert channel_order(torch.ones(4, 32), SemiStructured(2, 4)).tolist() == list(range(32))
