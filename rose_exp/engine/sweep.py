"""The blocked OBS sweep of SparseGPT: prunes columns in order and compensates in the remaining columns.

With U the upper Cholesky factor of the inverse Hessian, pruning weight w of column j costs (w / Uⱼⱼ)² / 2, and
the best compensation subtracts (w / Uⱼⱼ) · Uⱼₖ from the weights of the columns k > j (Frantar and Alistarh, 2023).
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
    """Prune the transposed weight ``w`` from first row to last, compensating each loss in the following rows.

    Args:
        w: Wᵀ, (columns, rows) in pruning order, contiguous (a column of the layer is a row of memory); modified in place,
            with exact zeros where pruned.
        upper: (columns, columns), the factor of the inverse Hessian in the same order.
        sparsity: unstructured: one selection over all rows of each block, when the sweep reaches it; N:M: one for each
            group of each row.
        widths: widths of the blocks (groups for N:M) in pruning order.
        block_size: for N:M, how many columns' errors are gathered into one update of the rest.
        kernels: the backend that loops over the columns of a block, see :mod:`rose_exp.engine.kernels`.

    Returns:
        The mask, (columns, rows) in pruning order, True where pruned, and the squared error of each update: of
        one block, or for N:M of the groups of about ``block_size`` columns. They sum to tr(D (H + λI) Dᵀ) of the change D
        of the weight: since D = E U, with the errors E = w / Uⱼⱼ of the pruned weights, and U (H + λI) Uᵀ = I, that is the sum
        of the squares of E.
    """
    grouped = isinstance(sparsity, SemiStructured)
    mask = torch.empty_like(w, dtype=torch.bool)
    costs = []
    start = 0
    for groups in _gather(widths, block_size) if grouped else ([width] for width in widths):
        stop = start + sum(groups)
        block, factor, chosen = w[start:stop], upper[start:stop, start:stop], mask[start:stop]
        if grouped:  # each group's mask is chosen after compensation for all columns before it
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
    """Split ``widths`` into runs that sum to at most ``limit`` or consist of a single larger width."""
    run: list[int] = []
    for width in widths:
        if run and sum(run) + width > limit:
            yield run
            run = []
        run.append(width)
    if run:
        yield run
