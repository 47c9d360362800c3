"""The pruning loop: calibrate a unit with dense weights, solve its layers, propagate, and save it.

A unit is a decoder block of a language model or a package of layers of a denoiser. The optional capabilities are components,
see :mod:`rose_exp.pruning.component`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from ..models import LinearLayer
from ..runtime import signals as interruption
from ..runtime.errors import RoseExpError
from .collect import Calibration, Clock, GroupInputs
from .component import Component, Group
from .context import PruneContext, synchronized_now
from .plan import PruningPlan, concerns
from .report import LayerReport, report_of, saved_numbers
from .unit import Unit

log = logging.getLogger(__name__)


class Pruner(ABC):
    """Prunes a model unit by unit, in place or, if its weights are not in memory, into ``context.state``.

    Subclasses supply the units, their calibration, and what follows from pruning them.
    """

    kind: ClassVar[str] = "unit"

    def __init__(self, plan: PruningPlan, context: PruneContext, components: Sequence[Component]):
        self.plan, self.context, self.components = plan, context, list(components)
        self.reports: list[LayerReport] = []

    @abstractmethod
    def modules(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield the modules that contain the layers to prune, with their full names in the model."""

    @property
    @abstractmethod
    def units(self) -> int:
        """Number of units to prune."""

    @abstractmethod
    def unit(self, index: int) -> AbstractContextManager[Unit]:
        """Return a context manager that yields a unit with its weights on the device."""

    @abstractmethod
    def calibrate(self, unit: Unit, calibration: Calibration) -> list[GroupInputs]:
        """Return the statistics of each group's inputs."""

    @abstractmethod
    def restore(self, count: int) -> None:
        """Restore the first ``count`` units from the checkpoint, and the inputs of the next one."""

    @abstractmethod
    def commit(self, unit: Unit, reports: Sequence[LayerReport]) -> None:
        """Save a pruned unit to the checkpoint."""

    def propagate(self, unit: Unit) -> None:
        """Compute the inputs of the next unit."""
        return

    def stop_inside(self, unit: Unit, reports: Sequence[LayerReport]) -> None:
        """Handle a stop request between two groups: save the pruned layers and stop, or finish the unit first."""
        return

    def check(self, layers: Iterable[LinearLayer]) -> None:
        """Check that the model suits the plan, before any long work.

        Args:
            layers: the layers to prune.
        Raises:
            RoseExpError: the model does not support a capability.
        """
        for reason, names in concerns(self.plan, layers).items():
            self.context.warn("unsuitable_method", names, reason)
        for component in self.components:
            component.check(self)

    @torch.no_grad()
    def run(self) -> list[LayerReport]:
        """Prune all units and return a report for every pruned layer, in pruning order.

        Raises:
            RoseExpError: a layer cannot be pruned; the message names the layer.
            Interrupted: a stop was requested; finished units are in the checkpoint.
        """
        for component in self.components:
            component.before_model(self)
        first = self._resume()
        for index in tqdm(range(first, self.units), "pruning", self.units, initial=first, unit=self.kind, disable=None):
            self.context.check_stop_between_units()
            with self.unit(index) as unit:
                reports = self.prune_unit(unit)
                self.propagate(unit)
                if self.context.state is not None:
                    self.commit(unit, reports)
            self._publish(reports)
            log.info("pruned %s (%d of %d)", unit.name, index + 1, self.units)
        return self.reports

    def _resume(self) -> int:
        """Restore the units in the checkpoint; return their number."""
        state = self.context.state
        if state is None or not state.progress.blocks:
            return 0
        count = state.progress.blocks
        log.info("resuming after %s %d of %d, which an earlier process has pruned", self.kind, count, self.units)
        self.restore(count)
        vars(self.context.seconds).update(state.progress.seconds)
        self._publish(state.reports)
        return count

    def _publish(self, reports: Sequence[LayerReport]) -> None:
        for report in reports:
            if self.context.on_layer is not None:
                self.context.on_layer(len(self.reports), report)
            self.reports.append(report)

    def prune_unit(self, unit: Unit) -> list[LayerReport]:
        """Prune the layers of a unit."""
        for component in self.components:
            component.before_unit(unit)
        reports: list[LayerReport] = []
        sequential = self.plan.true_sequential and unit.groups
        for groups in [[group] for group in unit.groups] if sequential else [unit.groups]:
            reports += self._prune_groups(unit, groups, reports)
        unit.reports = reports
        for component in self.components:
            component.after_unit(unit)
        facts = {name: value for component in self.components for name, value in component.unit_facts(unit).items()}
        return [replace(report, **facts) for report in reports] if facts else reports

    def _prune_groups(self, unit: Unit, groups: Sequence[Group], before: Sequence[LayerReport]) -> list[LayerReport]:
        """Calibrate and prune groups of layers.

        Args:
            before: reports of the unit's layers that are already pruned.
        """
        earlier = {report.name: report for report in unit.part[0]}
        pending = [group for group in groups if group[0].name not in earlier]
        done = [layer for group in groups for layer in group if layer.name in earlier]
        last = not groups or groups[-1] is unit.groups[-1]
        reports = [*before, *(earlier[layer.name] for layer in done)]
        waves = self.waves(pending)
        for place, wave in reversed([*enumerate(waves)]):  # later layers first: they do not affect the inputs of earlier ones
            final = place == 0
            whole = last and (final or place == len(waves) - 1)
            calibration = Calibration(wave, whole, last and final, Clock(self.context.device))
            reports += self._prune_wave(unit, calibration, reports, done if final else [])
        if len(waves) == 1 and not done:
            return reports[len(before) :]
        by_name = {report.name: report for report in reports}
        return [by_name[name] for group in groups for name in names_of(group) if name in by_name]

    def waves(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Split groups into successive parts whose statistics are collected in separate passes, to limit their memory."""
        return [list(groups)]

    def _prune_wave(
        self, unit: Unit, calibration: Calibration, before: Sequence[LayerReport], done: Sequence[LinearLayer]
    ) -> list[LayerReport]:
        """Calibrate and prune the groups of one pass.

        Args:
            before: reports of the unit's layers that are already pruned.
            done: layers that an earlier process has pruned, to restore after the calibration, which needs the dense weights.
        """
        context, seconds, groups = self.context, self.context.seconds, calibration.groups
        start = context.now()
        inputs = self._collect(unit, calibration)
        for layer in done:
            self._restore_layer(unit, layer)
        solving_start, studied = context.now(), seconds.studying
        arranged = (component.arrange(unit, groups) for component in self.components)
        solve_groups = next((order for order in arranged if order is not None), groups)
        by_layer = {layer.name: group_inputs for group, group_inputs in zip(groups, inputs, strict=True) for layer in group}
        del inputs
        solved = self._solve(unit, solve_groups, by_layer, before)
        seconds.moments += calibration.clock.seconds()
        seconds.calibrating += solving_start - start - calibration.clock.seconds()
        seconds.solving += context.now() - solving_start - (seconds.studying - studied)
        return solved

    def _collect(self, unit: Unit, calibration: Calibration) -> list[GroupInputs]:
        for component in self.components:
            inputs = component.collect(unit, calibration)
            if inputs is not None:
                return inputs
        start = self.context.now()
        inputs = self.calibrate(unit, calibration)
        for component in self.components:
            component.after_collect(unit, inputs, self.context.now() - start)
        return inputs

    def _solve(
        self, unit: Unit, groups: Sequence[Group], inputs: dict[str, GroupInputs], before: Sequence[LayerReport]
    ) -> list[LayerReport]:
        """Prune each group on the rank that owns it, and receive the pruned weights of the other ranks' groups.

        Args:
            inputs: statistics of the inputs by layer name; emptied, so that each is freed after its last use.
            before: reports of the unit's layers that are already pruned.
        """
        owners = self.context.ranks.owners([solving_cost(group) for group in groups])
        self._reduce(groups, owners, inputs)
        done, failure = self._solve_own(unit, groups, owners, inputs, before)
        return self._exchange(unit, groups, owners, done, failure)

    def _reduce(self, groups: Sequence[Group], owners: Sequence[int], inputs: dict[str, GroupInputs]) -> None:
        """Sum the statistics over all ranks on the owner of each group, and drop those of other ranks' groups.

        This happens before any group is solved, because each reduction waits for all ranks.
        """
        ranks = self.context.ranks
        reduced: set[int] = set()
        for group, owner in zip(groups, owners, strict=True):
            for name in names_of(group):
                layer_inputs = inputs.get(name)
                if layer_inputs is not None and id(layer_inputs) not in reduced:
                    reduced.add(id(layer_inputs))
                    ranks.reduce(layer_inputs.moments, owner)
                    if layer_inputs.cross_moments is not None:
                        ranks.reduce_cross_moments(layer_inputs.cross_moments, owner)
                if owner != ranks.rank:
                    inputs.pop(name, None)

    def _solve_own(
        self,
        unit: Unit,
        groups: Sequence[Group],
        owners: Sequence[int],
        inputs: dict[str, GroupInputs],
        before: Sequence[LayerReport],
    ) -> tuple[dict[int, list[LayerReport]], RoseExpError | None]:
        """Prune this rank's groups; return their reports by position, and the error of the group that failed, if any."""
        ranks = self.context.ranks
        last_use = {name: place for place, group in enumerate(groups) for name in names_of(group)}
        done: dict[int, list[LayerReport]] = {}
        for place, owner in enumerate(owners):
            if owner != ranks.rank:
                continue
            try:
                done[place] = self._solve_group(unit, groups[place], inputs)
            except RoseExpError as error:
                return done, error
            for name in [name for name in names_of(groups[place]) if last_use[name] == place]:
                inputs.pop(name, None)
            if ranks.size == 1 and interruption.stop_requested():
                self.stop_inside(unit, [*before, *(report for reports in done.values() for report in reports)])
        return done, None

    def _exchange(
        self,
        unit: Unit,
        groups: Sequence[Group],
        owners: Sequence[int],
        done: dict[int, list[LayerReport]],
        failure: RoseExpError | None,
    ) -> list[LayerReport]:
        """Distribute the pruned weights and the reports to all ranks.

        Raises:
            RoseExpError: a group failed on any rank.
        """
        ranks = self.context.ranks
        outgoing = [component.outgoing(unit) for component in self.components]
        answers = ranks.gather((done, outgoing, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (_, _, error) in enumerate(answers):
            if error is not None:
                raise RoseExpError(f"rank {rank}: {error}")
        for group, owner in zip(groups, owners, strict=True):
            for layer in group:
                ranks.broadcast(layer.module.weight.data, owner)
        names = [name for group in groups for name in names_of(group)]
        for place, component in enumerate(self.components):
            component.after_groups(unit, names, [rank_outgoing[place] for _, rank_outgoing, _ in answers])
        reports_by_group = {place: reports for rank_done, _, _ in answers for place, reports in rank_done.items()}
        return [report for place in range(len(groups)) for report in reports_by_group[place]]

    def _solve_group(self, unit: Unit, group: Group, inputs: dict[str, GroupInputs]) -> list[LayerReport]:
        """Prune layers that are solved together."""
        for shared in {id(inputs[name]): inputs[name] for name in names_of(group)}.values():
            shared.finish()
        for component in self.components:
            reports = component.solve(unit, group, inputs)
            if reports is not None:
                return reports
        group_inputs = inputs[group[0].name]
        for component in self.components:
            component.before_solve(unit, group, group_inputs)
        facts = {layer.name: {"target": group_inputs.target_kind} for layer in group}
        for component in self.components:
            for name, layer_facts in facts.items():
                layer_facts |= component.facts(unit, name)
        return solve_by_plan(unit, group, group_inputs, facts)

    def _restore_layer(self, unit: Unit, layer: LinearLayer) -> None:
        """Restore a layer that an earlier process pruned, and the layers that changed with it."""
        names = {layer.name} | self.changed_with(unit, {layer.name})
        for name in names:
            saved = unit.layers[name]
            saved.set_weight(unit.part[1][name].to(saved.weight))
            if f"{name}.bias" in unit.part[1]:
                saved.module.bias.data.copy_(unit.part[1][f"{name}.bias"])
        for component in self.components:
            component.restored(unit, names)

    def changed_with(self, unit: Unit, names: Collection[str]) -> set[str]:
        """Return the layers that pruning the layers ``names`` has changed as well."""
        return set().union(*(component.also_changed(unit, names) for component in self.components))


def solve_by_plan(
    unit: Unit,
    group: Group,
    inputs: GroupInputs,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    by_magnitude: bool = False,
) -> list[LayerReport]:
    """Prune layers that share their inputs with the plan's method, and return their reports.

    Args:
        facts: further fields of the reports by layer name.
        by_magnitude: whether to prune by magnitude instead of the plan's method.
    Raises:
        RoseExpError: the layers cannot be pruned; the message names them.
    """
    device, facts = group[0].weight.device, facts or {}
    start = synchronized_now(device)
    results = unit.plan.solve(group, inputs.moments, inputs.cross_moments, by_magnitude)
    saved = saved_numbers(results)
    seconds = (synchronized_now(device) - start) / sum(len(result.weight) for result in results)  # per row
    return [
        report_of(layer.name, result, inputs.moments.tokens, seconds * len(result.weight), count, **facts.get(layer.name, {}))
        for layer, result, count in zip(group, results, saved, strict=True)
    ]


def save_part(pruner: Pruner, unit: Unit, reports: Sequence[LayerReport]) -> None:
    """Save the pruned layers of a unit to the checkpoint, if there is one, and stop.

    Raises:
        Interrupted: always.
    """
    names = {report.name for report in reports}
    for component in pruner.components:
        component.after_groups(unit, names, [component.outgoing(unit)])
    if pruner.context.state is not None:
        others = pruner.changed_with(unit, names)
        weights = {name: unit.layers[name].weight for name in names | others}
        biases = {f"{name}.bias": unit.layers[name].module.bias for name in others}
        pruner.context.state.commit_part(reports, weights | {key: bias for key, bias in biases.items() if bias is not None})
    raise interruption.Interrupted(f"stopped after {reports[-1].name}")


def solving_cost(group: Group) -> float:
    """Return the number of operations of solving a group, up to a constant factor."""
    return group[0].columns ** 3 + sum(layer.weight.numel() * layer.columns for layer in group)


def names_of(layers: Sequence[LinearLayer]) -> list[str]:
    return [layer.name for layer in layers]
