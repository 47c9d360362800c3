"""Channel permutation for N:M sparsity.

An N:M pattern prunes a fixed number of weights in each group of adjacent columns, even where a group holds several important
ones. Permuting the channels spreads important columns over the groups, so that more of them are kept. The permutation is free
for layers whose input channels are the output channels of another layer (Pool and Yu, 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import SemiStructured

ROUNDS = 2  # in each round, every member of every group is reassigned once


def channel_order(scores: Tensor, sparsity: SemiStructured) -> Tensor:
    """Return a channel order that increases the sum of the scores that N:M pruning keeps.

    Channels are first distributed over the groups by their sums. Then, as in RIA (Zhang et al., 2024), one member of every
    group is removed, and the Hungarian algorithm reassigns these members so that the sum of the kept scores is largest. This
    repeats for each position in the groups. If the result is no better, the natural order is returned.

    Args:
        scores: importance of each weight, (rows, channels), non-negative.

    Returns:
        (channels,) int64: position i of the new order holds channel ``order[i]``. Channels beyond the last
            whole group keep their positions.
    """
    from scipy.optimize import linear_sum_assignment  # takes 36 MB (97 reserved), which most runs do not need

    channels, group = scores.shape[1], sparsity.group
    natural = torch.arange(channels, device=scores.device)
    groups, keep_count = channels // group, group - sparsity.pruned
    if groups < 2 or keep_count in (0, group):
        return natural
    grouped = scores[:, : groups * group].T.contiguous()  # a channel is contiguous
    members = grouped.sum(dim=1).argsort(descending=True, stable=True).view(group, groups)
    members[1::2] = members[1::2].flip(1)  # the group of the largest gets the smallest of the next
    for place in list(range(group)) * ROUNDS:
        moving, others = members[place], torch.cat([members[:place], members[place + 1 :]])
        # a group keeps the kept−1 largest of the others, and the larger of the next one and the new member
        threshold = grouped[others].topk(keep_count, dim=0).values[-1]
        # 2 Σ max, but for constants
        gain = torch.cdist(grouped[moving], threshold, p=1) + grouped[moving].sum(dim=1, keepdim=True)
        _, places = linear_sum_assignment(gain.T.cpu().double().numpy(), maximize=True)
        members[place] = moving[torch.as_tensor(places, device=members.device)]
    order = members.T.sort(dim=1).values  # the order within a group is irrelevant
    order = order[order[:, 0].argsort()].flatten()
    better = _kept_score(grouped[order], sparsity) > _kept_score(grouped, sparsity)
    return torch.cat([order if better else natural[: len(order)], natural[len(order) :]])


def _kept_score(channels: Tensor, sparsity: SemiStructured) -> float:
    """Return the sum of the scores (channels, rows) that N:M pruning keeps."""
    return float(
        channels.unflatten(0, (-1, sparsity.group)).topk(sparsity.group - sparsity.pruned, dim=1).values.double().sum()
    )
