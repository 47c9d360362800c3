"""The moments of a model's first block, which every run of a sweep finds the same that starts from the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ..engine import InputMoments


class FirstBlock:
    """Keeps the moments of the inputs of a dense model's first block, on the host, for the next run that would compute them.

    What is kept belongs to a key, which must tell apart all that the moments hang on; of several keys the last is kept. A run
    gets copies, equal bit for bit to what it would have found, since they come from the same operations.
    """

    def __init__(self):
        self._key: str | None = None
        self._moments: list[InputMoments] = []
        self._seconds = 0.0

    def find(self, key: str | None, device: object) -> tuple[list[InputMoments], float] | None:
        """Copies on ``device``, and the seconds that finding them took; None where this key's are not there."""
        if key is None or key != self._key:
            return None
        return [moments.to(device) for moments in copy.deepcopy(self._moments)], self._seconds

    def keep(self, key: str | None, moments: Sequence[InputMoments], seconds: float) -> None:
        if key is not None:
            self._key, self._seconds = key, seconds
            self._moments = [copy.deepcopy(of_group).to("cpu") for of_group in moments]
