"""Cache for the moments of a model's first block, which are equal in all runs of a sweep with the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ..engine import InputMoments


class FirstBlock:
    """Caches the input moments of a dense model's first block in host memory for later runs.

    The cache has one entry. Its key must distinguish everything the moments depend on. A run receives copies that are bitwise
    equal to the moments it would compute, because they result from the same operations.
    """

    def __init__(self):
        self._key: str | None = None
        self._moments: list[InputMoments] = []
        self._seconds = 0.0

    def find(self, key: str | None, device: object) -> tuple[list[InputMoments], float] | None:
        """Return copies on ``device`` and the seconds spent computing them; None if ``key`` is not cached."""
        if key is None or key != self._key:
            return None
        return [moments.to(device) for moments in copy.deepcopy(self._moments)], self._seconds

    def keep(self, key: str | None, moments: Sequence[InputMoments], seconds: float) -> None:
        if key is not None:
            self._key, self._seconds = key, seconds
            self._moments = [copy.deepcopy(of_group).to("cpu") for of_group in moments]
