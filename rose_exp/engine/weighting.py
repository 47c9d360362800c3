"""Weights of the denoising steps in the Hessian (OBS-Diff, 2025, equations 3 to 5)."""

from __future__ import annotations

import math
from typing import Literal, get_args

Weighting = Literal["uniform", "linear_increase", "linear_decrease", "log_increase", "log_decrease"]


def step_weights(steps: int, weighting: Weighting = "log_decrease", least: float = 0.8, most: float = 1.2) -> list[float]:
    """Return α_t of each denoising step, in pipeline order, from noise to image.

    ``log_decrease`` is the paper's α_t = α_min + (α_max − α_min) / ln T · ln(T − t + 1), t = 1 … T (Eq. 4),
    ``log_increase`` is its reverse; ``linear_…`` has equal increments; ``uniform`` is 1. A single step has the weight of
    the first of several.

    Args:
        steps: T, the number of steps.
        least, most: α_min and α_max.
    Raises:
        ValueError: if the number of steps, the weighting or the bounds are invalid.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting: expected one of {', '.join(get_args(Weighting))}, got {weighting!r}")
    if not 0 < least <= most < math.inf:
        raise ValueError(f"alpha_min: expected above 0 and at most alpha_max, {most:g}, got {least:g}")
    if weighting == "uniform":
        return [1.0] * steps
    if steps == 1:
        return [most if weighting.endswith("decrease") else least]
    if weighting.startswith("log"):
        shares = [math.log(steps - step) / math.log(steps) for step in range(steps)]  # 1 … 0
    else:
        shares = [(steps - 1 - step) / (steps - 1) for step in range(steps)]
    if weighting.endswith("increase"):
        shares.reverse()
    return [least + (most - least) * share for share in shares]
