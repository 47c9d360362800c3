"""The sweep of one block in plain torch, for any device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..selection import smallest

TILE = 32  # columns swept one by one before one matrix product updates the rest of the block


def choose(w: Tensor, upper: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` weights of smallest saliency (w / Uⱼⱼ)² in one block ``w`` (width, rows).

    Ties are broken by position in the layer, row by row.
    """
    saliency = (w / upper.diagonal()[:, None]).square_()
    return smallest(saliency.T.flatten(), count).view(w.shape[1], w.shape[0]).T


def sweep_chosen(w: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
    """Sweep one block ``w`` (width, rows) in place where ``mask`` is True and return the errors (width, rows)."""
    errors = torch.empty_like(w)
    for start in range(0, len(w), TILE):
        stop = min(start + TILE, len(w))
        for j in range(start, stop):
            _prune_column(w, upper, mask, errors, j, stop)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors


def sweep_groups(w: Tensor, upper: Tensor, mask: Tensor, widths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Sweep one block, choosing each row's mask of a group (``counts`` of ``widths`` columns) when the sweep reaches it."""
    errors = torch.empty_like(w)
    scale = upper.diagonal()[:, None]
    start = 0
    for width, count in zip(widths, counts, strict=True):
        stop = start + width
        saliency = (w[start:stop] / scale[start:stop]).square_()
        mask[start:stop] = smallest(saliency.T.contiguous(), count).T
        for j in range(start, stop):
            _prune_column(w, upper, mask, errors, j, stop)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
        start = stop
    return errors


def _prune_column(w: Tensor, upper: Tensor, mask: Tensor, errors: Tensor, j: int, stop: int) -> None:
    """Prune column j and compensate in the columns up to ``stop``."""
    torch.mul(w[j], mask[j], out=errors[j]).div_(upper[j, j])
    w[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j], alpha=-1)
    w[j].masked_fill_(mask[j], 0)
