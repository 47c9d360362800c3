"""Studies of the pruning order of single layers, before they are pruned."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase

from ..engine import NotPositiveDefiniteError
from ..engine.study import study_layer
from ..runtime.errors import RoseExpError
from .collect import GroupInputs
from .component import Component, Group
from .context import PruneContext
from .plan import PruningPlan
from .unit import Unit

log = logging.getLogger(__name__)


class LayerStudies(Component):
    """Studies the layers that match the plan's patterns and passes each study to ``context.on_study``."""

    def __init__(self, context: PruneContext):
        self.context = context

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> LayerStudies | None:
        return cls(context) if plan.study and context.on_study is not None else None

    def before_solve(self, unit: Unit, group: Group, inputs: GroupInputs) -> None:
        plan, start = unit.plan, self.context.now()
        for layer in group:
            if not any(fnmatchcase(layer.name, pattern) for pattern in plan.study):
                continue
            log.info("studying the order of %s", layer.name)
            sparsity = plan.sparsity_of(layer.name)
            try:
                study = study_layer(layer.weight, inputs.moments, sparsity, plan.block_size, plan.damping)
            except (ValueError, NotPositiveDefiniteError) as error:
                raise RoseExpError(f"{layer.name}: {error}") from error
            self.context.on_study(layer.name, study)
        self.context.seconds.studying += self.context.now() - start
