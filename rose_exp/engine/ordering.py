"""Pruning order of the columns of a layer.

Columns pruned late have few columns left to compensate for them. ROSE therefore prunes the columns and blocks with the largest
expected loss first, but only in columnar layers, whose loss is concentrated in a few blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .bounds import Fraction, check_options
from .patterns import Sparsity
from .scores import SCORES

Direction = Literal["descending", "ascending", "none"]


@dataclass(frozen=True)
class Ordering:
    """Options for ordering the columns of a layer by their expected loss.

    Args:
        columns: order of the columns within each block, by column loss.
        blocks: order of the blocks, by block loss.
        threshold: reorder only if the relative range of the block losses exceeds this value; None always reorders.
        score: expected loss of a weight, a name of :data:`rose_exp.engine.scores.SCORES`: ``wanda`` |W|·sqrt(E[x²]),
            ``magnitude`` |W|, ``obs`` W²/[H⁻¹]ⱼⱼ with the damped Hessian.
    """

    columns: Direction = "descending"
    blocks: Direction = "descending"
    threshold: Fraction | None = 0.5
    score: str = "wanda"

    def __post_init__(self):
        check_options(self)
        if self.score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {self.score!r}")

    def __bool__(self) -> bool:
        return (self.columns, self.blocks) != ("none", "none")

    @classmethod
    def rose(cls) -> Ordering:
        """Return the ordering of the ROSE paper: columns and blocks descending where the relative range exceeds 0.5."""
        return cls("descending", "descending", 0.5, "wanda")


@dataclass(frozen=True)
class ColumnOrder:
    """The column order of one layer. All tensors stay on the layer's device, without synchronization.

    Attributes:
        order: (columns,) int64; position i of the pruning order holds column ``order[i]``.
        block_order: (blocks,) int64, the order of the blocks if the layer is reordered.
        width: width of the blocks; the last one may be narrower.
        relative_range: relative range of the block losses, a scalar float tensor.
        reordered: whether the layer is reordered, a scalar bool tensor.
    """

    order: Tensor
    block_order: Tensor
    width: int
    relative_range: Tensor
    reordered: Tensor

    def widths(self, reordered: bool) -> list[int]:
        """Return the widths of the blocks in pruning order; ``reordered`` says whether the columns are reordered.

        Locating a narrow block after reordering synchronizes the device.
        """
        whole, narrow = divmod(len(self.order), self.width)
        widths = [self.width] * whole + [narrow] * (narrow > 0)
        return [widths[block] for block in self.block_order.tolist()] if reordered and narrow else widths


@dataclass(frozen=True)
class ExpectedLosses:
    """Expected losses from pruning a layer without compensation.

    Attributes:
        columns: (columns,), sum of the scores that would be pruned in each column.
        blocks: (blocks,), mean of the column losses of each block, so that a narrower last block is comparable.
        width: width of the blocks; the last one may be narrower.
    """

    columns: Tensor
    blocks: Tensor
    width: int

    @property
    def relative_range(self) -> Tensor:
        """(max − min) / max of the block losses, from 0 to 1; 0 if nothing is lost."""
        largest, smallest = self.blocks.max(), self.blocks.min()
        return torch.where(largest > 0, (largest - smallest) / largest, torch.zeros_like(largest))


def expected_losses(scores: Tensor, sparsity: Sparsity, block_size: int) -> ExpectedLosses:
    """Return the losses from pruning each block of ``scores`` (columns, rows) independently.

    The blocks are ``block_size`` columns wide, or one group for N:M patterns.
    """
    columns = len(scores)
    width = min(sparsity.block_width(block_size), columns)
    lost = sparsity.expected_column_losses(scores, width)
    full = columns - columns % width
    blocks = lost[:full].unflatten(0, (-1, width)).sum(dim=1) / width
    if full < columns:
        blocks = torch.cat([blocks, lost[full:].mean(dim=0, keepdim=True)])
    return ExpectedLosses(lost, blocks, width)


def arrange(ordering: Ordering | None, losses: ExpectedLosses) -> ColumnOrder:
    """Return the column order for the expected losses; equal losses keep their natural order."""
    columns, width = len(losses.columns), losses.width
    natural = torch.arange(columns, device=losses.columns.device)
    relative_range = losses.relative_range
    if not ordering:
        stays = torch.zeros_like(relative_range, dtype=torch.bool)
        return ColumnOrder(natural, natural[: len(losses.blocks)], width, relative_range, stays)

    # two stable sorts, secondary key first: by loss within the block, then by the position of the block
    inside = _argsort(losses.columns, ordering.columns)
    block_order = _argsort(losses.blocks, ordering.blocks)
    place = torch.empty_like(block_order).scatter_(0, block_order, natural[: len(block_order)])
    order = inside[place[inside // width].argsort(stable=True)]

    reordered = torch.ones_like(relative_range, dtype=torch.bool)
    if ordering.threshold is not None:
        reordered = relative_range > ordering.threshold
        order = torch.where(reordered, order, natural)
    return ColumnOrder(order, block_order, width, relative_range, reordered)


def _argsort(losses: Tensor, direction: Direction) -> Tensor:
    if direction == "none":
        return torch.arange(len(losses), device=losses.device)
    return losses.argsort(descending=direction == "descending", stable=True)
