"""|W|·sqrt(E[x²]), the score of Wanda, which ROSE uses for ordering."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..methods import Layer


def score(layer: Layer) -> Tensor:
    return layer.transposed.abs().mul_(layer.curvature.norms[:, None])
