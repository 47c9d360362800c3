"""W²/[H⁻¹]ⱼⱼ with the damped Hessian: the Optimal Brain Surgeon's loss of pruning a single weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..methods import Layer


def score(layer: Layer) -> Tensor:
    saliency = layer.transposed.square().div_(layer.factor.inverse_diagonal()[:, None])
    return saliency.masked_fill_(layer.dead[:, None], 0)
