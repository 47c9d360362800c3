"""Cache for the moments of a model's first block, which are equal in all runs of a sweep with the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine import InputMoments
from .collect import Calibration, GroupInputs
from .component import Component

if TYPE_CHECKING:
    from .context import PruneContext
    from .plan import PruningPlan
    from .unit import Unit


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
            self._moments = [copy.deepcopy(group_moments).to("cpu") for group_moments in moments]


class FirstBlockReuse(Component):
    """Takes the moments of the first block from ``context.first_block``, or keeps them there for later runs."""

    def __init__(self, context: PruneContext):
        self.context = context

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> FirstBlockReuse | None:
        usable = not plan.true_sequential and not plan.target  # both need more than the moments of a single pass
        return cls(context) if usable and context.first_block is not None else None

    def collect(self, unit: Unit, calibration: Calibration) -> list[GroupInputs] | None:
        context, groups = self.context, calibration.groups
        if not self._applies(unit, len(groups)):
            return None
        cached = context.first_block.find(context.first_key, context.device)
        if cached is None:
            return None
        moments, context.seconds.shared = cached
        if [group_moments.columns for group_moments in moments] != [group[0].columns for group in groups]:
            raise RuntimeError(f"{unit.name}: cached moments belong to other layers")
        return [GroupInputs(group_moments) for group_moments in moments]

    def after_collect(self, unit: Unit, inputs: Sequence[GroupInputs], seconds: float) -> None:
        if self._applies(unit, len(inputs)) and inputs:
            self.context.first_block.keep(self.context.first_key, [group_inputs.moments for group_inputs in inputs], seconds)

    @staticmethod
    def _applies(unit: Unit, groups: int) -> bool:
        """Return whether a pass collects the moments of all ``groups`` of the first block."""
        return unit.index == 0 and not unit.part[0] and groups == len(unit.groups)
