"""Structured pruning: removes heads and neurons, updates the layers that read them, and reports the result."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine import METHODS, InputMoments, NotPositiveDefiniteError
from ..engine.groups import GroupedLayer, Structured, prune_groups
from ..models import Structure, find_structures
from ..runtime.errors import RoseExpError
from .component import Component, Group
from .plan import PruningPlan
from .report import LayerReport

if TYPE_CHECKING:
    from .collect import GroupInputs
    from .context import PruneContext
    from .loop import Pruner
    from .unit import Unit


def wanted_structures(module: nn.Module, name: str, plan: PruningPlan) -> list[Structure]:
    """Return the structures inside a module that the plan prunes.

    The plan prunes a structure if it covers the structure's kind and all layers that read it.

    Args:
        name: full name of the module in the model.
    Raises:
        RoseExpError: the heads of an attention cannot be identified.
    """
    if not plan.structured:
        return []
    structures = find_structures(module, name, plan.sparsity.kinds)
    return [structure for structure in structures if all(plan.wants(part.layer.name) for part in structure.consumers)]


def check_structures(structures: Sequence[Structure], sparsity: Structured) -> None:
    """Check that each requested kind of structure has groups to remove.

    Raises:
        RoseExpError: a kind has none.
    """
    for kind in sparsity.kinds:
        groups = [structure.groups for structure in structures if structure.kind == kind]
        if not groups:
            raise RoseExpError(
                f"sparsity.{kind}: expected a model with {kind} to prune in a known layout, got none; "
                f"set sparsity.{kind}=false to keep them"
            )
        if sparsity.ratio and not sum(map(sparsity.count, groups)):
            raise RoseExpError(
                f"sparsity.ratio: expected a ratio that removes at least one of {max(groups)} {kind} and keeps one, "
                f"got {sparsity.ratio:g}"
            )


@torch.no_grad()
def prune_structure(structure: Structure, moments: Mapping[str, InputMoments], plan: PruningPlan) -> list[LayerReport]:
    """Prune groups of a structure: update the layers that read them, and zero the rows that produce them.

    Args:
        moments: input moments of each layer that reads the groups, by layer name.
    Returns:
        A report for each layer that reads the groups.
    Raises:
        RoseExpError: the structure cannot be pruned; the message names it.
    """
    start, sparsity = time.perf_counter(), plan.sparsity
    kind = type(plan.method)
    method = next(name for name, method_class in METHODS.items() if method_class is kind)
    device = structure.consumers[0].layer.weight.device
    layers = []
    for part in structure.consumers:
        weight, places = part.layer.weight, part.places.to(device)
        outside = torch.ones(weight.shape[1], dtype=torch.bool, device=device)
        outside[places.flatten()] = False
        dead = (outside & (weight == 0).all(dim=0)).nonzero().flatten()  # pruned with a neighbor, or zero before
        layers.append(GroupedLayer(weight, moments[part.layer.name], places, dead, structure.makers_norm()))
    try:
        result = prune_groups(
            layers,
            sparsity.count(structure.groups),
            method=method,
            saliency=sparsity.saliency,
            damping=plan.damping,
            at_once=1 if structure.kind == "heads" else sparsity.at_once,
        )
    except (ValueError, NotPositiveDefiniteError) as error:
        raise RoseExpError(f"{structure.name}: {error}") from error
    for part, weight in zip(structure.consumers, result.weights, strict=True):
        part.layer.set_weight(weight)
    structure.mask(result.removed.cpu())
    seconds = (time.perf_counter() - start) / len(layers)
    return [
        LayerReport(
            name=part.layer.name,
            rows=len(weight),
            columns=weight.shape[1],
            tokens=moments[part.layer.name].tokens,
            sparsity=int((weight == 0).sum()) / weight.numel(),
            error=error,
            relative_range=0.0,
            reordered=False,
            damping=result.damping,
            rank=0,
            seconds=seconds,
            removed=int(result.removed.sum()),
            groups=structure.groups,
            requested=sparsity.ratio,
            hessian_used=method == "sparsegpt",
        )
        for part, weight, error in zip(structure.consumers, result.weights, result.errors, strict=True)
    ]


class StructuredRemoval(Component):
    """Removes heads and neurons: solves the layers that read them together, and masks the rows that produce them."""

    def __init__(self):
        self.structures: list[Structure] = []
        self.arranged: list[tuple[Group, Structure]] = []

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> StructuredRemoval | None:
        return cls() if plan.structured else None

    def check(self, pruner: Pruner) -> None:
        plan = pruner.plan
        structures = [structure for module, name in pruner.modules() for structure in wanted_structures(module, name, plan)]
        check_structures(structures, plan.sparsity)

    def before_unit(self, unit: Unit) -> None:
        """Find the unit's structures, and calibrate only the layers that read them."""
        names = {layer.name for group in unit.groups for layer in group}
        structures = wanted_structures(unit.module, unit.module_name, unit.plan)
        self.structures = [structure for structure in structures if _consumers(structure) <= names]
        consumer_names = {name for structure in self.structures for name in _consumers(structure)}
        kept = [[layer for layer in group if layer.name in consumer_names] for group in unit.groups]
        unit.groups = [group for group in kept if group]

    def arrange(self, unit: Unit, groups: Sequence[Group]) -> Sequence[Group]:
        names = {layer.name for group in groups for layer in group}
        complete = [structure for structure in self.structures if _consumers(structure) <= names]
        self.arranged = [([part.layer for part in structure.consumers], structure) for structure in complete]
        return [group for group, _ in self.arranged]

    def solve(self, unit: Unit, group: Group, inputs: dict[str, GroupInputs]) -> list[LayerReport]:
        structure = next(structure for arranged, structure in self.arranged if arranged is group)
        moments = {layer.name: inputs[layer.name].moments for layer in group}
        return prune_structure(structure, moments, unit.plan)

    def after_groups(self, unit: Unit, names: Collection[str], answers: Sequence[Any]) -> None:
        self.restored(unit, names)

    def also_changed(self, unit: Unit, names: Collection[str]) -> set[str]:
        return {maker.layer.name for s in self.structures if _consumers(s) & set(names) for maker in s.makers}

    def restored(self, unit: Unit, names: Collection[str]) -> None:
        for structure in self.structures:
            if _consumers(structure) <= set(names):
                structure.mask(structure.masked())


def _consumers(structure: Structure) -> set[str]:
    return {part.layer.name for part in structure.consumers}
