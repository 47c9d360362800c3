"""The interface of the optional capabilities of pruning, which the loop calls at fixed points."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..models import LinearLayer

if TYPE_CHECKING:
    from .collect import Calibration, GroupInputs
    from .context import PruneContext
    from .loop import Pruner
    from .plan import PruningPlan
    from .report import LayerReport
    from .unit import Unit

Group = Sequence[LinearLayer]


class Component:
    """An optional capability, such as a sparsity allocation or structured removal.

    Subclasses override the points at which they act; here, every point does nothing. To add a capability, write a subclass in
    a file of its own and list it in :mod:`rose_exp.pruning.components`.
    """

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> Component | None:
        """Return the component if the plan uses the capability, otherwise None."""
        raise NotImplementedError

    def check(self, pruner: Pruner) -> None:
        """Check that the model supports the capability, before any expensive work.

        Raises:
            RoseExpError: it does not.
        """

    def before_model(self, pruner: Pruner) -> None:
        """Called before the first unit is pruned or restored, once the inputs of the first unit are available."""

    def before_unit(self, unit: Unit) -> None:
        """Called before a unit is calibrated, while it has its dense weights."""

    def arrange(self, unit: Unit, groups: Sequence[Group]) -> Sequence[Group] | None:
        """Return the layers to solve, grouped into those that are solved together; None for the groups of shared inputs."""
        return None

    def collect(self, unit: Unit, calibration: Calibration) -> list[GroupInputs] | None:
        """Return the statistics of the groups' inputs; None to leave the calibration to others."""
        return None

    def after_collect(self, unit: Unit, inputs: Sequence[GroupInputs], seconds: float) -> None:
        """Called after the statistics of ``inputs`` are collected, which took ``seconds``."""

    def solve(self, unit: Unit, group: Group, inputs: dict[str, GroupInputs]) -> list[LayerReport] | None:
        """Prune the layers of a group and return their reports; None to leave the group to the plan's method.

        Args:
            inputs: statistics of the inputs by layer name.
        """
        return None

    def before_solve(self, unit: Unit, group: Group, inputs: GroupInputs) -> None:
        """Called before the plan's method prunes a group; may replace the statistics in ``inputs``."""

    def facts(self, unit: Unit, name: str) -> dict[str, Any]:
        """Return fields for the report of a layer that the plan's method has pruned."""
        return {}

    def outgoing(self, unit: Unit) -> Any:
        """Return the values that this rank sends to the other ranks after solving."""
        return None

    def after_groups(self, unit: Unit, names: Collection[str], answers: Sequence[Any]) -> None:
        """Called after the layers ``names`` are pruned on all ranks, with the :meth:`outgoing` values of the ranks."""

    def also_changed(self, unit: Unit, names: Collection[str]) -> set[str]:
        """Return further layers that pruning the layers ``names`` has changed."""
        return set()

    def restored(self, unit: Unit, names: Collection[str]) -> None:
        """Called after the pruned layers ``names`` are restored from a checkpoint."""

    def after_unit(self, unit: Unit) -> None:
        """Called after all layers of a unit are pruned, before its outputs are computed."""

    def unit_facts(self, unit: Unit) -> dict[str, Any]:
        """Return fields for the reports of all pruned layers of a unit, after :meth:`after_unit`."""
        return {}
