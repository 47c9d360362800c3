"""The blocked OBS sweep of SparseGPT: prune columns in order, and let those still to come make up for the loss.

With U the upper Cholesky factor of the inverse Hessian, pruning weight w of column j costs (w / Uⱼⱼ)² / 2, and is best
made up for by subtracting (w / Uⱼⱼ) · Uⱼₖ from the weights of the columns k > j (Frantar and Alistarh, 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .patterns import SemiStructured, Sparsity

TILE = 32  # columns swept one by one before their errors reach the rest of the block as one matrix product


def sweep(weight: Tensor, upper: Tensor, sparsity: Sparsity, widths: Sequence[int], block_size: int) -> tuple[Tensor, Tensor]:
    """Prune ``weight`` from the left to the right, compensating each loss with the columns further right.

    Args:
        weight: (rows, columns) in pruning order; not modified.
        upper: (columns, columns), the factor of the inverse Hessian in the same order.
        sparsity: unstructured: one selection over all rows of each block, when the sweep reaches it; N:M: one for each
            group of each row.
        widths: widths of the blocks (groups for N:M) in pruning order.
        block_size: for N:M, how many columns' errors are gathered into one update of the rest.

    Returns:
        The weights with exact zeros where pruned, and the mask, both (rows, columns) in pruning order.
    """
    grouped = isinstance(sparsity, SemiStructured)
    w = weight.T.contiguous()  # (columns, rows): a column of the layer is a row of memory
    mask = torch.zeros_like(w, dtype=torch.bool)
    start = 0
    for groups in _gather(widths, block_size) if grouped else ([width] for width in widths):
        stop = start + sum(groups)
        block, factor, chosen = w[start:stop], upper[start:stop, start:stop], mask[start:stop]
        if grouped:
            errors = _sweep_block(block, factor, chosen, list(_gather(groups, TILE)), sparsity)
        else:
            chosen.copy_(_select(block, factor.diagonal(), sparsity))
            tiles = [[min(TILE, len(block) - tile)] for tile in range(0, len(block), TILE)]
            errors = _sweep_block(block, factor, chosen, tiles)
        if stop < len(w):
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    w.masked_fill_(mask, 0)
    return w.T, mask.T


def _sweep_block(
    w: Tensor, upper: Tensor, mask: Tensor, tiles: Sequence[Sequence[int]], sparsity: Sparsity | None = None
) -> Tensor:
    """Sweep a block ``w`` (width, rows) in place, and return its errors (width, rows).

    Tiles are lists of group widths. With a ``sparsity``, the mask of each group is chosen when the sweep reaches it.
    """
    errors = torch.empty_like(w)
    diagonal = upper.diagonal()
    start = 0
    for groups in tiles:
        stop = start + sum(groups)
        first = start
        for width in groups:
            group = slice(first, first + width)
            if sparsity is not None:
                mask[group] = _select(w[group], diagonal[group], sparsity)
            for j in range(first, first + width):
                torch.mul(w[j], mask[j], out=errors[j]).div_(diagonal[j])
                w[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j], alpha=-1)
            first += width
        w[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
        start = stop
    return errors


def _select(w: Tensor, diagonal: Tensor, sparsity: Sparsity) -> Tensor:
    """The mask of ``w`` (width, rows) by saliency (w / Uⱼⱼ)², chosen row by row of the layer, the same shape."""
    saliency = (w / diagonal[:, None]).square_()
    return sparsity.select(saliency.T.contiguous()).T


def _gather(widths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Cut ``widths`` into runs that sum to at most ``limit``, or hold a single width above it."""
    run: list[int] = []
    for width in widths:
        if run and sum(run) + width > limit:
            yield run
            run = []
        run.append(width)
    if run:
        yield run
