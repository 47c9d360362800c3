"""Pruning of one block: collect moments with dense weights, solve the layers, and run the pruned block."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engine import (
    InputMoments,
    NotPositiveDefiniteError,
    Structured,
)
from ..engine.allocation import BlockSurvey
from ..engine.study import LayerStudy, study_layer
from ..models import LinearLayer, linear_layers, one_by_one
from ..runtime import signals as interruption
from ..runtime.errors import RoseExpError
from ..runtime.ranks import Ranks
from ..runtime.signals import Interrupted
from .activations import Activations
from .allocation import BlockWatch
from .capture import BlockCall
from .collect import Clock, Collector, GroupInputs
from .first_block import FirstBlock
from .permutation import ChannelOrders, Channels
from .plan import LayerReport, PassSeconds, PruningPlan, report_of
from .structured import prune_structure, wanted_structures

log = logging.getLogger(__name__)


class BlockWalk:
    """Prunes the layers of one block.

    Args:
        groups: names of the block's layers in call order, grouped by shared input.
        adding: names of the layers whose output is added to the hidden states.
        channels: layers whose input channels can be reordered before pruning.
        calls: arguments of the block for each batch, by the index of its first window.
        dense_calls: the same for the dense model's hidden states.
        dense: hidden states of the dense model; None if the plan has no regression target.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        groups: Sequence[Sequence[str]],
        adding: Sequence[str],
        channels: Sequence[Channels],
        calls: Mapping[int, BlockCall],
        dense_calls: Mapping[int, BlockCall],
        plan: PruningPlan,
        device: torch.device | str,
        ranks: Ranks,
        seconds: PassSeconds,
        on_study: Callable[[str, LayerStudy], None] | None,
        dense: Activations | None = None,
    ):
        self.block, self.name, self.plan, self.device = block, name, plan, device
        self.calls, self.dense_calls = calls, dense_calls
        self.ranks, self.seconds, self.on_study, self.dense = ranks, seconds, on_study, dense
        layers = self.layers = {layer.name: layer for layer in linear_layers(block, name)}
        wanted = [[layers[name] for name in group if plan.wants(name)] for group in groups]
        self.groups = [group for group in wanted if group]  # each group shares its input
        called = [name for group in groups for name in group]
        closing = called[-1] if called and called[-1] in adding else None
        self.collector = Collector(block, name, (calls, dense_calls), plan, device, adding, closing, self._check_stop)
        self.structures = {
            part.layer.name: structure for structure in wanted_structures(block, name, plan) for part in structure.consumers
        }
        if isinstance(plan.sparsity, Structured):
            self.groups = [group for group in self.groups if group[0].name in self.structures]
        alone = [group[0] for group in groups if len(group) == 1]  # reordering would affect other readers
        self.channels = ChannelOrders(layers, [of_layer for of_layer in channels if of_layer.layer in alone])
        self.first_block: FirstBlock | None = None
        self.first_key: str | None = None
        self.part: tuple[list[LayerReport], dict[str, Tensor]] = ([], {})  # layers pruned by an earlier process
        self.keep_part: Callable[[Sequence[LayerReport], Mapping[str, Tensor]], None] | None = None

    def advance(self, hidden: Activations, weights: str = "pruned") -> None:
        """Run the block on all hidden states and replace them by its outputs.

        Args:
            weights: ``pruned`` or ``dense``, for the error message.
        Raises:
            RoseExpError: the block returns NaN or infinity.
        """
        start = self._now()
        calls = self.dense_calls if hidden is self.dense else self.calls
        finite = torch.ones((), dtype=torch.bool, device=self.device)  # read once at the end, to synchronize once
        for windows, batch in tqdm(hidden, f"advancing {self.name}", len(hidden.pieces), False, disable=None, unit="batch"):
            self._check_stop()
            with one_by_one(self.block):
                answer = calls[windows.start].run(self.block, batch)
            finite &= torch.isfinite(answer).all()
            hidden[windows] = answer
        if not finite:
            kind = str(answer.dtype).removeprefix("torch.")
            raise RoseExpError(
                f"{self.name}: expected finite outputs with {weights} weights, got NaN or infinity in {kind}, whose maximum is "
                f"{torch.finfo(answer.dtype).max:.3g}; set model.dtype to float32 or bfloat16, which have a larger range"
            )
        self.seconds.advancing += self._now() - start

    def survey(self, hidden: Activations) -> BlockSurvey:
        """Run the dense block on the hidden states and return the survey of its layers."""
        start, watch = self._now(), BlockWatch(self.groups, self.device)
        advancing = self.seconds.advancing
        with ExitStack() as stack:
            watch.hooks(stack)
            self.advance(hidden, "dense")
        found = watch.survey(self.plan.allocation, self.ranks)
        self.seconds.advancing = advancing
        self.seconds.surveying += self._now() - start
        return found

    def _check_stop(self) -> None:
        """Stop between two batches if this is the only process; several processes stop together between two blocks."""
        if self.ranks.size == 1:
            interruption.check()

    def prune(self, hidden: Activations) -> list[LayerReport]:
        """Prune the layers of the block.

        Raises:
            RoseExpError: a layer cannot be pruned; the message names it.
            Interrupted: a stop was requested; layers pruned so far are saved.
        """
        reports: list[LayerReport] = []
        earlier = {report.name: report for report in self.part[0]}
        twin = copy.deepcopy(self.block) if self.dense is not None and self.plan.true_sequential else self.block
        for groups in [[group] for group in self.groups] if self.plan.true_sequential and self.groups else [self.groups]:
            before = [layer for group in groups for layer in group if layer.name in earlier]
            left = [group for group in groups if group[0].name not in earlier]
            start = self._now()
            clock = Clock(self.device)
            last = not groups or groups[-1] is self.groups[-1]
            inputs = self._collect(left, hidden, twin, last, clock)
            for layer in before:  # after calibration, which needs the dense weights
                self._take_up(layer)
            middle = self._now()
            studied = self.seconds.studying
            solved = self._solve(left, inputs, [*reports, *(earlier[layer.name] for layer in before)])
            found = earlier | {report.name: report for report in solved}
            reports += [found[name] for group in groups for name in _names(group)]
            self.seconds.moments += clock.seconds()
            self.seconds.calibrating += middle - start - clock.seconds()
            self.seconds.solving += self._now() - middle - (self.seconds.studying - studied)
        return reports

    def _collect(
        self, groups: Sequence[Sequence[LinearLayer]], hidden: Activations, twin: nn.Module, last: bool, clock: Clock
    ) -> list[GroupInputs]:
        """Return the input statistics of each group; the ``last`` groups also advance the dense hidden states."""
        if self.dense is not None:
            return self.collector.pairs(groups, hidden, self.dense, twin, last, clock)
        kept = self.first_block.find(self.first_key, self.device) if self.first_block else None
        if kept is not None:
            moments, self.seconds.shared = kept
            if [of_group.columns for of_group in moments] != [group[0].columns for group in groups]:
                raise RuntimeError(f"{self.name}: cached moments belong to other layers")
            return [GroupInputs(of_group) for of_group in moments]
        start = self._now()
        found = self.collector.moments(groups, hidden, clock)
        if self.first_block and groups:
            self.first_block.keep(self.first_key, [of_group.moments for of_group in found], self._now() - start)
        return found

    def _solve(
        self,
        groups: Sequence[Sequence[LinearLayer]],
        inputs: list[GroupInputs],
        before: Sequence[LayerReport],
    ) -> list[LayerReport]:
        """Prune each group on the rank that owns it, and receive the pruned weights of the other ranks' groups.

        Args:
            before: reports of the layers in this block that are already pruned.
        """
        ranks = self.ranks
        owners = ranks.owners([group[0].columns ** 3 + sum(x.weight.numel() * x.columns for x in group) for group in groups])
        done: dict[int, list[LayerReport]] = {}
        failure = None
        for place, owner in enumerate(owners):  # reduce all groups before solving any, since each reduction waits for all ranks
            ranks.reduce(inputs[place].moments, owner)
            if inputs[place].drift is not None:
                ranks.reduce_drift(inputs[place].drift, owner)
            if owner != ranks.rank:
                inputs[place] = None
        for place, owner in enumerate(owners):
            if owner == ranks.rank and failure is None:
                try:
                    done[place] = self._prune_group(groups[place], inputs[place])
                except RoseExpError as error:
                    failure = error
                inputs[place] = None  # free its memory for the next group
                if ranks.size == 1 and failure is None and interruption.requested():
                    self._keep_and_stop([*before, *(report for reports in done.values() for report in reports)])
        answers = ranks.gather((done, self.channels.waiting, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (_, _, error) in enumerate(answers):
            if error is not None:
                raise RoseExpError(f"rank {rank}: {error}")
        for group, owner in zip(groups, owners, strict=True):
            for layer in group:
                ranks.broadcast(layer.module.weight.data, owner)
                self._mask(layer.name)
        self.channels.order_makers({name: order for _, orders, _ in answers for name, order in orders.items()})
        everything = {place: reports for reports_of_rank, _, _ in answers for place, reports in reports_of_rank.items()}
        return [report for place in range(len(groups)) for report in everything[place]]

    def _keep_and_stop(self, reports: Sequence[LayerReport]) -> None:
        self.channels.order_makers(self.channels.waiting)
        if self.keep_part is not None:
            names = {report.name for report in reports}
            makers = {maker for name in names for maker in self.channels.makers(name)}
            biases = {f"{name}.bias": self.layers[name].module.bias for name in makers}
            weights = {name: self.layers[name].weight for name in names | makers}
            self.keep_part(reports, weights | {name: bias for name, bias in biases.items() if bias is not None})
        raise Interrupted(f"stopped after {reports[-1].name}")

    def _take_up(self, layer: LinearLayer) -> None:
        """Restore a layer that an earlier process pruned, and the layers that produce its inputs."""
        for name in (layer.name, *self.channels.makers(layer.name)):
            there = self.layers[name]
            there.set_weight(self.part[1][name].to(there.weight))
            self._mask(name)
            if f"{name}.bias" in self.part[1]:
                there.module.bias.data.copy_(self.part[1][f"{name}.bias"])

    def _mask(self, name: str) -> None:
        """Zero the rows that produce the heads or neurons removed from this layer."""
        if name in self.structures:
            self.structures[name].mask(self.structures[name].masked())

    def _prune_group(self, group: Sequence[LinearLayer], inputs: GroupInputs) -> list[LayerReport]:
        plan, moments = self.plan, inputs.moments
        moments.finish()
        if inputs.drift is not None:
            inputs.drift.finish()
        if group[0].name in self.structures:
            return prune_structure(self.structures[group[0].name], {group[0].name: moments}, plan)
        starved = group[0].of_expert and moments.tokens < plan.expert_tokens
        if starved and plan.starved_experts == "stop":
            raise RoseExpError(
                f"{', '.join(_names(group))}: expected at least {plan.expert_tokens} calibration tokens for the expert "
                f"(pipeline.expert_tokens), got {moments.tokens}; raise calibration.samples or set pipeline.starved_experts"
            )
        if starved and plan.starved_experts == "dense":
            return [self._untouched(layer, moments.tokens) for layer in group]
        try:
            self._study_group(group, moments)
        except (ValueError, NotPositiveDefiniteError) as error:
            raise RoseExpError(f"{', '.join(_names(group))}: {error}") from error
        start = self._now()
        if group[0].name in self.channels:
            columns = self.channels.order(group[0], moments, plan.sparsity)
            inputs.moments = moments = moments.permuted(columns)
            inputs.drift = inputs.drift.permuted(columns) if inputs.drift is not None else None
        results = plan.solve(group, moments, inputs.drift, starved)
        zeros = torch.stack([(result.weight == 0).sum() for result in results]).tolist()
        saved = [r.weight.numel() - r.stored if r.rank else count for r, count in zip(results, zeros, strict=True)]
        seconds = (self._now() - start) / sum(len(result.weight) for result in results)  # per row
        return [
            report_of(
                layer.name,
                result,
                moments.tokens,
                seconds * layer.weight.shape[0],
                count,
                instead="magnitude" if starved else None,
                target=inputs.asked,
                permuted=self.channels.moved(layer.name),
            )
            for layer, result, count in zip(group, results, saved, strict=True)
        ]

    def _study_group(self, group: Sequence[LinearLayer], moments: InputMoments) -> None:
        """Study the layers of a group that match ``plan.study``, before they are pruned."""
        plan, start = self.plan, self._now()
        for layer in group:
            if self.on_study and any(fnmatchcase(layer.name, pattern) for pattern in plan.study):
                log.info("studying the order of %s", layer.name)
                sparsity = plan.sparsity_of(layer.name)
                self.on_study(layer.name, study_layer(layer.weight, moments, sparsity, plan.block_size, plan.damping))
        self.seconds.studying += self._now() - start

    @staticmethod
    def _untouched(layer: LinearLayer, tokens: int) -> LayerReport:
        rows, columns = layer.weight.shape
        return LayerReport(
            name=layer.name,
            rows=rows,
            columns=columns,
            tokens=tokens,
            sparsity=int((layer.weight == 0).sum()) / (rows * columns),
            error=0.0,
            relative_range=0.0,
            reordered=False,
            damping=0.0,
            rank=0,
            seconds=0.0,
            instead="dense",
        )

    def _now(self) -> float:
        """Return the current time after synchronizing the device."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _names(layers: Sequence[LinearLayer]) -> list[str]:
    return [layer.name for layer in layers]
