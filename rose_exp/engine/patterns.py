"""What a mask may look like: how many of which weights are pruned together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import lost_by_rank, lost_by_threshold, smallest


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go: ``int(n · ratio)`` of the n weights that are compared with each other.

    Args:
        ratio: share of the weights to prune, 0 to 1.
    """

    ratio: float

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio: expected a number from 0 to 1, got {self.ratio}")

    def block_width(self, block_size: int) -> int:
        """Width of the column blocks in which the weights are compared when pruning in blocks."""
        return block_size

    def count(self, weights: int) -> int:
        """Weights to prune of so many."""
        return int(weights * self.ratio)

    def select(self, scores: Tensor) -> Tensor:
        """The mask of one block: the smallest of all its scores, (..., rows, columns) to bool of the same shape."""
        flat = scores.flatten(-2)
        return smallest(flat, self.count(flat.shape[-1])).view(scores.shape)

    def select_by_row(self, scores: Tensor) -> Tensor:
        """The mask when each row keeps the same number of weights: (rows, columns) to bool of the same shape."""
        return smallest(scores, self.count(scores.shape[-1]))

    def expected_column_losses(self, scores: Tensor, width: int) -> Tensor:
        """What an ordering expects each column to lose: in each block of ``width`` columns of ``scores`` (columns, rows) all
        scores up to the one at sorted index int(n · ratio), summed by column, (columns,).

        That is one score more than :meth:`select` takes, and all of its equals. It is the rule of the authors' code, and
        is kept because the order hangs on it: a column's loss moves by a whole score. It decides no mask.
        """
        return lost_by_threshold(scores, width, self.count)

    def __str__(self) -> str:
        return f"{self.ratio:.0%} unstructured" if self.ratio * 100 % 1 == 0 else f"{self.ratio} unstructured"


@dataclass(frozen=True)
class SemiStructured:
    """N:M sparsity: in each row, ``pruned`` of every ``group`` consecutive weights go, as in SparseGPT and Wanda.

    2:4 is ``SemiStructured(2, 4)``. Where the width is no multiple of the group, the last, narrower group of w weights
    loses ``w · pruned // group`` of them.

    Args:
        pruned: N, weights to prune in each group.
        group: M, weights in a group.
    """

    pruned: int
    group: int

    def __post_init__(self):
        if self.group < 1:
            raise ValueError(f"group: expected at least 1, got {self.group}")
        if not 0 <= self.pruned <= self.group:
            raise ValueError(f"pruned: expected 0 to {self.group} (the group), got {self.pruned}")

    @property
    def ratio(self) -> float:
        return self.pruned / self.group

    def block_width(self, block_size: int) -> int:
        """The group: the blocks that an ordering may move are whole groups, whatever the block size."""
        return self.group

    def count(self, width: int) -> int:
        """Weights to prune in a group of ``width``, the last of which may be narrower than the others."""
        return width * self.pruned // self.group

    def select(self, scores: Tensor) -> Tensor:
        """The mask of whole groups that lie side by side, (..., rows, columns) to bool of the same shape."""
        columns = scores.shape[-1]
        whole = columns - columns % self.group
        grouped = scores[..., :whole].unflatten(-1, (-1, self.group))
        mask = smallest(grouped, self.pruned).flatten(-2)
        if whole < columns:
            rest = smallest(scores[..., whole:], self.count(columns - whole))
            mask = torch.cat([mask, rest], dim=-1)
        return mask

    select_by_row = select  # a group never leaves its row

    def expected_column_losses(self, scores: Tensor, width: int) -> Tensor:
        """What an ordering expects each column to lose: the scores that :meth:`select` takes, summed by column, (columns,)."""
        return lost_by_rank(scores, width, self.count)

    def __str__(self) -> str:
        return f"{self.pruned}:{self.group}"


Sparsity = Unstructured | SemiStructured
