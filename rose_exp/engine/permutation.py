"""Channels of an N:M pruned layer in another order, so that what its groups keep is worth more.

An N:M pattern counts within groups of columns that lie side by side. Where several columns of one group hold much, one of them
must go all the same; side by side with columns that hold little they could all stay. Layers whose inputs another layer of the
model makes, channel by channel, can be given theirs in any order for free (as in Pool and Yu, 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import SemiStructured

ROUNDS = 2  # of moving every member of every group once


def channel_order(scores: Tensor, sparsity: SemiStructured) -> Tensor:
    """The order of channels whose groups keep most, as far as it is found.

    Channels are dealt to the groups by their sums. Then, as in RIA (Zhang et al., 2024), one member of every group is taken
    out, and all of these are assigned anew so that the sum of what is kept is the largest, which the Hungarian algorithm finds;
    so in turn with each place of the groups. The natural order stays where that does not better it.

    Args:
        scores: what each weight is worth, (rows, channels), none negative.

    Returns:
        (channels,) int64: position i of the new order holds channel ``order[i]``. Channels beyond the last whole group stay.
    """
    from scipy.optimize import linear_sum_assignment  # here: it takes 36 MB, and reserves 97, that most runs have no use for

    channels, group = scores.shape[1], sparsity.group
    natural = torch.arange(channels, device=scores.device)
    groups, kept = channels // group, group - sparsity.pruned
    if groups < 2 or kept in (0, group):
        return natural
    whole = scores[:, : groups * group].T.contiguous()  # a channel is a row of memory
    members = whole.sum(dim=1).argsort(descending=True, stable=True).view(group, groups)
    members[1::2] = members[1::2].flip(1)  # the group of the largest gets the smallest of the next
    for place in list(range(group)) * ROUNDS:
        moving, others = members[place], torch.cat([members[:place], members[place + 1 :]])
        # a group keeps the kept−1 largest of the others, and the larger of the next one and the new member
        threshold = whole[others].topk(kept, dim=0).values[-1]
        gain = torch.cdist(whole[moving], threshold, p=1) + whole[moving].sum(dim=1, keepdim=True)  # 2 Σ max, but for constants
        _, places = linear_sum_assignment(gain.T.cpu().double().numpy(), maximize=True)
        members[place] = moving[torch.as_tensor(places, device=members.device)]
    found = members.T.sort(dim=1).values  # inside a group the order is of no meaning
    found = found[found[:, 0].argsort()].flatten()
    better = _kept(whole[found], sparsity) > _kept(whole, sparsity)
    return torch.cat([found if better else natural[: len(found)], natural[len(found) :]])


def _kept(channels: Tensor, sparsity: SemiStructured) -> float:
    """Sum of what groups keep of scores (channels, rows)."""
    return float(
        channels.unflatten(0, (-1, sparsity.group)).topk(sparsity.group - sparsity.pruned, dim=1).values.double().sum()
    )
