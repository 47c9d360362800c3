"""The blocked OBS sweep of SparseGPT: prune columns in order, and let those still to come make up for the loss.

With U the upper Cholesky factor of the inverse Hessian, pruning weight w of column j costs (w / Uⱼⱼ)² / 2, and is best
made up for by subtracting (w / Uⱼⱼ) · Uⱼₖ from the weights of the columns k > j (Frantar and Alistarh, 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .patterns import SemiStructured, Sparsity


def sweep(
    w: Tensor,
    upper: Tensor,
    sparsity: Sparsity,
    widths: Sequence[int],
    block_size: int,
    kernels: ModuleType,
) -> tuple[Tensor, Tensor]:
    """Prune the transposed weight ``w`` from its first row to its last, compensating each loss with those further down.

    Args:
        w: Wᵀ, (columns, rows) in pruning order, contiguous (a column of the layer is a row of memory); swept in place, to
            exact zeros where pruned.
        upper: (columns, columns), the factor of the inverse Hessian in the same order.
        sparsity: unstructured: one selection over all rows of each block, when the sweep reaches it; N:M: one for each
            group of each row.
        widths: widths of the blocks (groups for N:M) in pruning order.
        block_size: for N:M, how many columns' errors are gathered into one update of the rest.
        kernels: the backend that does the loop over the columns of a block, see :mod:`rose_exp.engine.kernels`.

    Returns:
        The mask, (columns, rows) in pruning order, True where pruned, and the squared error that each update has cost: of
        one block, or for N:M of the groups of about ``block_size`` columns. They sum to tr(D (H + λI) Dᵀ) of the change D
        of the weight: since D = E U, with the errors E = w / Uⱼⱼ of what was pruned, and U (H + λI) Uᵀ = I, that is the sum
        of the squares of E.
    """
    grouped = isinstance(sparsity, SemiStructured)
    mask = torch.empty_like(w, dtype=torch.bool)
    costs = []
    start = 0
    for groups in _gather(widths, block_size) if grouped else ([width] for width in widths):
        stop = start + sum(groups)
        block, factor, chosen = w[start:stop], upper[start:stop, start:stop], mask[start:stop]
        if grouped:  # the mask of each group is chosen from weights that all columns before it have compensated
            errors = kernels.sweep_groups(block, factor, chosen, groups, [sparsity.count(width) for width in groups])
        else:
            chosen.copy_(kernels.choose(block, factor, sparsity.count(block.numel())))
            errors = kernels.sweep_chosen(block, factor, chosen)
        if stop < len(w):
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        costs.append(torch.linalg.vecdot(errors.flatten(), errors.flatten()))
        start = stop
    return mask, torch.stack(costs)


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
