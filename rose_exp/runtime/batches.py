"""Batch sizes of windows and images."""

from __future__ import annotations

import torch


def batch_size(batch: int, device: torch.device | str) -> int:
    """Return the batch size to use on ``device`` for a configured ``batch``: 1 on a CPU, else ``batch``.

    A matrix product over several windows can round differently from the products over single windows, and pruning amplifies
    rounding: masks flip where scores are nearly equal, and the following blocks increase the difference. With one window at a
    time, results are bitwise equal for every configured batch size. This is about as fast on a CPU, because one window is
    enough work for its cores. A GPU needs larger batches for full utilization.
    """
    return 1 if torch.device(device).type == "cpu" else batch
