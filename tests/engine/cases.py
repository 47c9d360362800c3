"""Random layers and their moments."""

from __future__ import annotations

import torch
from torch import Tensor

from rose_exp.engine import InputMoments


def layer(rows: int, columns: int, tokens: int = 0, *, columnar: bool = False, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Return a weight and correlated inputs; if ``columnar``, the last third of the input channels is much larger."""
    tokens = tokens or 4 * columns
    mixing = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    inputs = torch.randn(tokens, columns) @ mixing
    if columnar:
        inputs[:, -(columns // 3) :] *= 6
    return torch.randn(rows, columns).to(dtype), inputs


def moments_of(inputs: Tensor, dtype=torch.float32) -> InputMoments:
    moments = InputMoments(inputs.shape[1], dtype=dtype)
    moments.update(inputs)
    return moments
