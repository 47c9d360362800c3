"""Options of block reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from ..engine.bounds import AboveZero, Count, Positive, check_options


@dataclass(frozen=True)
class Reconstruction:
    """Options of block reconstruction, which trains a pruned block to reproduce the dense model's hidden states.

    Args:
        epochs: largest number of passes over the training windows; 0 for no reconstruction.
        parts: ``separate`` trains the layers up to the attention's output first, then the others. ``together`` trains all
            layers of a block at once, as do blocks that do not add the attention's output to the hidden states.
        rate: initial learning rate of Adam; it decreases linearly to 0.
        batch: number of windows per step, over all processes.
        held_out: fraction of the windows that are only used to measure the error after each epoch; at least one window.
        patience: number of epochs without a lower error on these windows after which the training stops.
    """

    epochs: Count = 0
    parts: Literal["separate", "together"] = "separate"
    rate: AboveZero = 5e-4
    batch: Positive = 4
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.125
    patience: Positive = 2

    def __post_init__(self):
        check_options(self)

    def __bool__(self) -> bool:
        return self.epochs > 0
