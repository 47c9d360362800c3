"""Slow reference implementation, written from the formulas column by column and independent of the engine.

``inclusive=True`` follows the released code of the papers, whose masks select every score up to the one at sorted index
int(n·p); ``False`` selects exactly int(n·p) scores and breaks ties by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def marked(scores: Tensor, share: float, inclusive: bool) -> Tensor:
    """Unstructured mask over all scores of a one- or two-dimensional tensor, in row-major order."""
    flat = scores.flatten().tolist()
    count = int(len(flat) * share)
    if inclusive:
        bound = sorted(flat)[min(count, len(flat) - 1)]
        chosen = [value <= bound for value in flat]
    else:
        first = sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count]
        chosen = [i in set(first) for i in range(len(flat))] if count < 50 else _from_indices(first, len(flat))
    return torch.tensor(chosen).view(scores.shape)


def _from_indices(indices: list[int], length: int) -> list[bool]:
    chosen = [False] * length
    for index in indices:
        chosen[index] = True
    return chosen


def marked_in_groups(scores: Tensor, pruned: int, group: int) -> Tensor:
    """N:M mask (rows, columns) of the smallest scores in each group of each row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], group):
            values = scores[row, start : start + group].tolist()
            count = len(values) * pruned // group
            for index in sorted(range(len(values)), key=lambda i: (values[i], i))[:count]:
                mask[row, start + index] = True
    return mask


@dataclass
class Pattern:
    """Unstructured (``share``) or N:M (``pruned`` of ``group``) sparsity."""

    share: float = 0.0
    pruned: int = 0
    group: int = 0

    def mask(self, scores: Tensor, inclusive: bool) -> Tensor:
        if self.group:
            return marked_in_groups(scores, self.pruned, self.group)
        return marked(scores, self.share, inclusive)


def hessian_of(inputs: Tensor) -> Tensor:
    """H = 2 X Xᵀ for one calibration sequence with inputs (tokens, columns)."""
    scaled = math.sqrt(2) * inputs  # the released code scales before multiplying
    return scaled.T @ scaled


def rose_order(scores: Tensor, pattern: Pattern, block: int, threshold: float | None = 0.5, inclusive: bool = True):
    """Column order of ROSE from importance scores: (order, block widths in that order, relative range)."""
    width = pattern.group or block
    blocks = []
    for start in range(0, scores.shape[1], width):
        part = scores[:, start : start + width]
        lost = part * pattern.mask(part, inclusive)
        column = [float(lost[:, j].sum()) for j in range(part.shape[1])]
        inside = sorted(range(len(column)), key=lambda j: -column[j])
        blocks.append((sum(column) / len(column), [start + j for j in inside], [start + j for j in range(len(column))]))
    largest, smallest = max(b[0] for b in blocks), min(b[0] for b in blocks)
    relative_range = (largest - smallest) / largest if largest else 0.0
    if threshold is not None and relative_range <= threshold:
        order = [j for b in blocks for j in b[2]]
        return torch.tensor(order), [len(b[2]) for b in blocks], relative_range
    blocks.sort(key=lambda b: -b[0])
    return torch.tensor([j for b in blocks for j in b[1]]), [len(b[1]) for b in blocks], relative_range


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    *,
    block: int = 128,
    damping: float = 0.01,
    order: Tensor | None = None,
    widths: list[int] | None = None,
    inclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """SparseGPT column by column: pruned weight and mask, (rows, columns) in natural order.

    The inverse Hessian of the remaining columns is updated by one step of Gaussian elimination per column, instead of a
    Cholesky factorization of the inverse: its [H⁻¹]ⱼⱼ is the square of the diagonal of the factor.
    """
    columns = weight.shape[1]
    order = torch.arange(columns) if order is None else order
    step = pattern.group or block
    widths = widths or [min(step, columns - start) for start in range(0, columns, step)]
    h = hessian[order][:, order].clone()
    w = weight[:, order].clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=h.dtype)
    inverse = torch.linalg.inv(h)
    variances = _remaining_variances(inverse)
    mask = torch.zeros_like(w, dtype=torch.bool)
    start = 0
    for width in widths:
        stop = start + width
        mask[:, start:stop] = pattern.mask(w[:, start:stop] ** 2 / variances[start:stop], inclusive)
        for j in range(start, stop):
            lost = torch.where(mask[:, j], w[:, j], 0)
            w -= torch.outer(lost / inverse[j, j], inverse[j])  # rows of columns before j are 0
            w[:, j] = torch.where(mask[:, j], 0, w[:, j])
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j] = 0
            inverse[:, j] = 0
        start = stop
    back = torch.argsort(order)
    return w[:, back], mask[:, back]


def _remaining_variances(inverse: Tensor) -> Tensor:
    """[H⁻¹]ⱼⱼ of the Hessian without the columns before j, for each j."""
    inverse = inverse.clone()
    found = torch.empty(len(inverse), dtype=inverse.dtype)
    for j in range(len(inverse)):
        found[j] = inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


def released_sweep(weight: Tensor, hessian: Tensor, pattern: Pattern, order: Tensor | None = None, block: int = 128):
    """SparseGPT in float32 with the arithmetic of the released code: Cholesky factor, blocks, inclusive threshold."""
    columns = weight.shape[1]
    order = torch.arange(columns) if order is None else order
    h, w = hessian[order][:, order].clone(), weight[:, order].clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += torch.diag((0.01 * h.diagonal().mean()).expand(columns))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(len(w), stop - start)
        scale = upper.diagonal()
        if not pattern.group:
            mask = marked(w[:, start:stop] ** 2 / scale[start:stop] ** 2, pattern.share, inclusive=True)
        else:
            mask = torch.zeros(len(w), stop - start, dtype=torch.bool)
        for j in range(start, stop):
            if pattern.group and (j - start) % pattern.group == 0:
                group = slice(j, j + pattern.group)
                here = slice(j - start, j - start + pattern.group)
                mask[:, here] = marked_in_groups(w[:, group] ** 2 / scale[group] ** 2, pattern.pruned, pattern.group)
            error = torch.where(mask[:, j - start], w[:, j], 0) / scale[j]
            w[:, j:stop] -= torch.outer(error, upper[j, j:stop])
            w[:, j] = torch.where(mask[:, j - start], 0, w[:, j])
            errors[:, j - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w[:, torch.argsort(order)]


def dsnot_row(
    weight: list[float],
    wanda: list[float],
    mean: list[float],
    variance: list[float],
    mask: list[bool],
    *,
    cycles: int = 50,
    threshold: float = 0.1,
    tokens: int = 2048,
    group: int = 0,
    initial: list[float] | None = None,
) -> list[bool]:
    """DSnoT on one row as described in the paper: grow and prune one weight per cycle.

    Wanda scores select the weight to prune in unstructured rows, and the initial metric in N:M groups, where a sign change of
    the error also ends the row.
    """
    mask = list(mask)
    effect = [w * m * tokens for w, m in zip(weight, mean, strict=True)]
    error = sum(e for e, gone in zip(effect, mask, strict=True) if gone)
    sign = math.copysign(1, error) if error else 0
    growable = sorted((j for j in range(len(mask)) if mask[j]), key=lambda j: (effect[j] / variance[j], j))
    fresh = [j for j in range(len(mask)) if not mask[j]]  # kept initially and not pruned since
    waiting: dict[bool, Callable[[int], bool]] = {True: lambda j: effect[j] < 0, False: lambda j: effect[j] > 0}
    for _ in range(cycles):
        if abs(error) <= threshold or not growable:
            break
        positive = error > 0
        grown = growable.pop() if positive else growable.pop(0)
        if group:
            fitting = [j for j in fresh if j // group == grown // group]
            fitting.sort(key=lambda j: (initial[j], j))
        else:
            fitting = sorted(filter(waiting[positive], fresh), key=lambda j: (wanda[j], j))
        if not fitting:
            continue
        victim = fitting[0]
        after = error + effect[victim] - effect[grown]
        if group and (math.copysign(1, after) if after else 0) != sign:
            break
        fresh.remove(victim)
        mask[grown], mask[victim] = False, True
        error = after
    return mask
