"""Weights of the denoising steps in the Hessian (OBS-Diff, 2025, equations 3 to 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .bounds import AboveZero, check_options

Weighting = Literal["uniform", "linear_increase", "linear_decrease", "log_increase", "log_decrease"]


@dataclass(frozen=True, kw_only=True)
class StepWeighting:
    """How the denoising steps are weighted in the Hessian.

    Args:
        weighting: form of α_t over the steps, see :meth:`weights`.
        alpha_min, alpha_max: bounds of α_t.
    """

    weighting: Weighting = "log_decrease"
    alpha_min: AboveZero = 0.8
    alpha_max: AboveZero = 1.2

    def __post_init__(self):
        check_options(self)
        if self.alpha_min > self.alpha_max:
            raise ValueError(f"alpha_min: expected at most alpha_max, {self.alpha_max:g}, got {self.alpha_min:g}")

    def weights(self, steps: int) -> list[float]:
        """Return α_t of each denoising step, in pipeline order, from noise to image.

        ``log_decrease`` is the paper's α_t = α_min + (α_max − α_min) / ln T · ln(T − t + 1), t = 1 … T (Eq. 4),
        ``log_increase`` is its reverse; ``linear_…`` has equal increments; ``uniform`` is 1. A single step has the weight of
        the first of several.

        Args:
            steps: T, the number of steps.
        Raises:
            ValueError: if the number of steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        low, high = self.alpha_min, self.alpha_max
        if self.weighting == "uniform":
            return [1.0] * steps
        if steps == 1:
            return [high if self.weighting.endswith("decrease") else low]
        if self.weighting.startswith("log"):
            shares = [math.log(steps - step) / math.log(steps) for step in range(steps)]  # 1 … 0
        else:
            shares = [(steps - 1 - step) / (steps - 1) for step in range(steps)]
        if self.weighting.endswith("increase"):
            shares.reverse()
        return [low + (high - low) * share for share in shares]
