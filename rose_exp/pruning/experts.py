"""Experts that receive too few calibration tokens to be calibrated."""

from __future__ import annotations

from ..runtime.errors import RoseExpError
from .collect import GroupInputs
from .component import Component, Group
from .context import PruneContext
from .loop import names_of, solve_by_plan
from .plan import PruningPlan
from .report import LayerReport
from .unit import Unit


class StarvedExperts(Component):
    """Leaves starved experts, and other layers without tokens, dense, prunes them by magnitude, or stops the run."""

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> StarvedExperts:
        return cls()

    def solve(self, unit: Unit, group: Group, inputs: dict[str, GroupInputs]) -> list[LayerReport] | None:
        moments, plan = inputs[group[0].name].moments, unit.plan
        needed, of = (plan.expert_tokens, "expert") if group[0].of_expert else (1, "layer")  # none is calibrated without tokens
        if moments.tokens >= needed:
            return None
        if plan.starved_experts == "stop":
            raise RoseExpError(
                f"{', '.join(names_of(group))}: expected at least {needed} calibration tokens for the {of} "
                f"(pipeline.expert_tokens), got {moments.tokens}; raise calibration.samples or set pipeline.starved_experts"
            )
        if plan.starved_experts == "magnitude":
            facts = {layer.name: {"fallback": "magnitude"} for layer in group}
            return solve_by_plan(unit, group, GroupInputs(moments), facts, by_magnitude=True)
        return [
            LayerReport(
                name=layer.name,
                rows=layer.weight.shape[0],
                columns=layer.weight.shape[1],
                tokens=moments.tokens,
                sparsity=int((layer.weight == 0).sum()) / layer.weight.numel(),
                error=0.0,
                relative_range=0.0,
                reordered=False,
                damping=0.0,
                rank=0,
                seconds=0.0,
                fallback="dense",
            )
            for layer in group
        ]
