"""Sparsity patterns: which weights are compared with each other, and how many of them are pruned."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import Fraction, check_options
from .selection import lost_by_rank, lost_by_threshold, smallest


@dataclass(frozen=True)
class Unstructured:
    """Unstructured sparsity: prunes ``int(n · ratio)`` of the n weights that are compared with each other.

    Args:
        ratio: fraction of the weights to prune, from 0 to 1.
    """

    ratio: Fraction

    def __post_init__(self):
        check_options(self)

    def block_width(self, block_size: int) -> int:
        """Return the width of the column blocks within which weights are compared."""
        return block_size

    def count(self, weights: int) -> int:
        """Return how many of ``weights`` weights to prune."""
        return int(weights * self.ratio)

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask of the smallest scores of a block, (..., rows, columns) to bool of the same shape."""
        flat = scores.flatten(-2)
        return smallest(flat, self.count(flat.shape[-1])).view(scores.shape)

    def select_by_row(self, scores: Tensor) -> Tensor:
        """Return the mask of the smallest scores of each row, (rows, columns) to bool of the same shape."""
        return smallest(scores, self.count(scores.shape[-1]))

    def expected_column_losses(self, scores: Tensor, width: int) -> Tensor:
        """Return the expected loss of each column, (columns,), from which an ordering is computed.

        In each block of ``width`` columns of ``scores`` (columns, rows), sums by column all scores up to the one at sorted
        index int(n · ratio). This includes one score more than :meth:`select` prunes, and its ties, as in the authors' code.
        The rule is kept because it changes column losses by whole scores, and so the order. It does not affect the mask.
        """
        return lost_by_threshold(scores, width, self.count)

    def __str__(self) -> str:
        return f"{self.ratio:.0%} unstructured" if self.ratio * 100 % 1 == 0 else f"{self.ratio} unstructured"


@dataclass(frozen=True)
class SemiStructured:
    """N:M sparsity: prunes ``pruned`` of every ``group`` consecutive weights of a row, as in SparseGPT and Wanda.

    2:4 is ``SemiStructured(2, 4)``. If the width is not a multiple of the group, the last, narrower group of w weights
    loses ``w · pruned // group`` of them.

    Args:
        pruned: N, the number of weights to prune in each group.
        group: M, the number of weights in a group.
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
        """Return the group size: an ordering moves whole groups, regardless of the block size."""
        return self.group

    def count(self, width: int) -> int:
        """Return how many weights to prune in a group of ``width``; the last group may be narrower than the others."""
        return width * self.pruned // self.group

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask of adjacent groups, (..., rows, columns) to bool of the same shape."""
        columns = scores.shape[-1]
        full = columns - columns % self.group
        grouped = scores[..., :full].unflatten(-1, (-1, self.group))
        mask = smallest(grouped, self.pruned).flatten(-2)
        if full < columns:
            remainder = smallest(scores[..., full:], self.count(columns - full))
            mask = torch.cat([mask, remainder], dim=-1)
        return mask

    select_by_row = select  # a group never spans rows

    def expected_column_losses(self, scores: Tensor, width: int) -> Tensor:
        """Return the expected loss of each column, (columns,): the sum of the scores that :meth:`select` prunes."""
        return lost_by_rank(scores, width, self.count)

    def __str__(self) -> str:
        return f"{self.pruned}:{self.group}"


Sparsity = Unstructured | SemiStructured
"""A sparsity pattern that masks weights."""


def as_sparsity(value: Sparsity | float | str) -> Sparsity:
    """Return a sparsity pattern from a number or text.

    Args:
        value: a pattern; the ratio of unstructured sparsity as a number or text, such as 0.7; or text such as ``"2:4"``.

    Raises:
        ValueError: it is none of these, or out of range.
    """
    if isinstance(value, Unstructured | SemiStructured):
        return value
    text = str(value)
    numbers = re.fullmatch(r"(\d+):(\d+)", text)
    if numbers:
        return SemiStructured(*map(int, numbers.groups()))
    try:
        ratio = math.nan if isinstance(value, bool) else float(text)
    except ValueError:
        ratio = math.nan
    if not 0 <= ratio <= 1:
        percent = f"; did you mean {ratio / 100:g}?" if 5 <= ratio <= 100 else ""
        raise ValueError(f"sparsity: expected a ratio from 0 to 1, a pattern such as 2:4 or an object, got {value!r}{percent}")
    return Unstructured(ratio)
