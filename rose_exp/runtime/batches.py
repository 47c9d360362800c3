"""How many windows or images go through a model at once."""

from __future__ import annotations

import torch


def at_once(batch: int, device: torch.device | str) -> int:
    """The batch size to use on ``device`` for a configured ``batch``.

    On a CPU it is 1. A matrix product over several windows may round differently from the products over each, and pruning
    amplifies rounding: masks flip where scores are nearly equal, and the following blocks make the difference larger. One
    window at a time makes a result equal bit for bit at every configured batch size, and is about as fast, because a window
    alone is enough work for the cores. A GPU needs larger batches to be busy.
    """
    return 1 if torch.device(device).type == "cpu" else batch
