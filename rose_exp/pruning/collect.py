"""Calibration: forward passes of a block with dense weights that collect the moments of its layers' inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engine import CrossMoments, InputMoments, Precision
from ..models import LinearLayer, linear_layers, unstacked_experts
from .activations import Activations
from .calls import BlockCall
from .capture import StopForward
from .plan import PruningPlan


@dataclass
class GroupInputs:
    """Statistics of the inputs that a group of layers shares.

    Attributes:
        cross_moments: cross moments with the dense model's inputs; None if not collected.
        target_kind: regression target of the layers, see ``target`` of :class:`LayerReport`.
    """

    moments: InputMoments
    cross_moments: CrossMoments | None = None
    target_kind: str = "dense"

    def finish(self) -> None:
        """Round the sums to their dtypes. Call it after the last batch."""
        self.moments.finish()
        if self.cross_moments is not None:
            self.cross_moments.finish()


@dataclass
class Calibration:
    """Options of one calibration pass.

    Attributes:
        groups: groups of layers with shared inputs, in call order.
        whole: whether the pass runs to the end of the unit instead of stopping at the last group.
        last: whether it is the last pass over the unit.
        clock: measures the time of updating the statistics.
    """

    groups: Sequence[Sequence[LinearLayer]]
    whole: bool
    last: bool
    clock: Clock


@dataclass(frozen=True)
class Roles:
    """What a block does with its layers, as far as calibration depends on it.

    Attributes:
        adding: names of the layers whose output is added to the hidden states.
        closing: the layer in ``adding`` that is called last in the block, whose sum with the hidden states is the block's
            output; None if the last call goes to another layer.
        repeated: names of the layers that are called several times in a pass, each alone in its group. They are calibrated on
            the inputs of all calls.
    """

    adding: Collection[str] = ()
    closing: str | None = None
    repeated: Collection[str] = ()

    def in_order(self, groups: Sequence[Sequence[LinearLayer]]) -> bool:
        """Return whether the last call of a pass goes to the last group.

        This does not hold for experts, whose call order depends on the tokens, and for layers that are called several times.
        """
        return not any(group[0].of_expert or group[0].name in self.repeated for group in groups)


class Collector:
    """Collects the moments of the inputs of a block's layers.

    Args:
        calls: arguments of the block for each batch, for the pruned and for the dense model's hidden states.
        check_stop: called between two batches.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        calls: tuple[Mapping[int, BlockCall], Mapping[int, BlockCall]],
        plan: PruningPlan,
        device: torch.device | str,
        roles: Roles,
        check_stop: Callable[[], None],
    ):
        self.block, self.name, self.plan, self.device = block, name, plan, device
        self.calls, self.dense_calls = calls
        self.roles, self.check_stop = roles, check_stop

    def moments(self, calibration: Calibration, hidden: Activations) -> list[GroupInputs]:
        """Collect the moments of each group's inputs in one forward pass that stops at the last group."""
        groups, clock = calibration.groups, calibration.clock
        inputs = [GroupInputs(empty_moments(group, self.device, self.plan.precision)) for group in groups]
        if not groups:
            return inputs
        with unstacked_experts(self.block), ExitStack() as stack:
            for group, group_inputs in zip(groups, inputs, strict=True):
                stop = group is groups[-1] and self.roles.in_order(groups)
                hook = update_moments(group_inputs.moments, clock, stop)
                stack.callback(group[0].module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for windows, batch in self._bar(hidden, hidden):
                self.check_stop()
                with suppress(StopForward):
                    self.calls[windows.start].run(self.block, batch)
        return inputs

    def pairs(
        self, calibration: Calibration, hidden: Activations, dense: Activations, dense_block: nn.Module
    ) -> list[GroupInputs]:
        """Collect the moments of each group's inputs, and their cross moments with the dense model's inputs.

        Runs the block on the hidden states of both models, batch by batch.

        Args:
            dense: hidden states of the dense model, replaced by the block's outputs in the last pass over the block.
            dense_block: the block with its dense weights.
        """
        groups, whole, clock = calibration.groups, calibration.whole, calibration.clock
        inputs = [self._empty_inputs(group) for group in groups]
        for (_, entering), (windows, entering_dense) in self._bar(zip(hidden, dense, strict=True), hidden):
            self.check_stop()
            dense_recorded = self._record(dense_block, entering_dense, self.dense_calls[windows.start], groups, whole)
            if groups:
                recorded = self._record(self.block, entering, self.calls[windows.start], groups, whole)
                entering_both = (entering, entering_dense)
                with clock:
                    for place, group_inputs in enumerate(inputs):
                        self._add(group_inputs, groups[place], place, (recorded, dense_recorded), entering_both)
            if calibration.last:
                dense[windows] = dense_recorded.output
        for group, group_inputs in zip(groups, inputs, strict=True):
            cross = group_inputs.cross_moments
            if cross is not None and group[0].name == self.roles.closing and cross.residual is not None:
                cross.subtract_own_output(group[0].weight)
        return inputs

    def _add(
        self,
        inputs: GroupInputs,
        group: Sequence[LinearLayer],
        place: int,
        recorded: tuple[_Recorded, _Recorded],
        entering: tuple[Tensor, Tensor],
    ) -> None:
        """Add the inputs of one group, recorded in a pass of the pruned and one of the dense model, to its statistics.

        Args:
            entering: hidden states at the start of both passes.
        """
        pruned, dense = recorded
        for x in pruned.inputs[place]:
            inputs.moments.update(x)
        if inputs.cross_moments is None:
            return
        (x,), (dense_x,) = pruned.inputs[place], dense.inputs[place]
        missing = None
        if inputs.cross_moments.residual is not None:
            closes = group[0].name == self.roles.closing
            missing = dense.output - pruned.output if closes else entering[1] - entering[0]
            missing = missing.reshape(*x.shape[:-1], -1)
        inputs.cross_moments.update(x, dense_x, missing)

    def _empty_inputs(self, group: Sequence[LinearLayer]) -> GroupInputs:
        moments = empty_moments(group, self.device, self.plan.precision)
        if group[0].of_expert or group[0].name in self.roles.repeated:  # the two models route different tokens to an expert
            return GroupInputs(moments)
        width = len(group[0].weight) if len(group) == 1 and group[0].name in self.roles.adding else None
        columns, rows = group[0].columns, len(group[0].weight)
        weight = group[0].weight if len(group) == 1 and narrow(rows, columns) else None
        cross_moments = CrossMoments(columns, width, weight=weight, device=self.device, dtype=moments.dtype)
        kind = "asymmetric" if self.plan.target.strength else "dense"
        return GroupInputs(moments, cross_moments, kind if width is None else "residual")

    def _record(
        self, block: nn.Module, hidden: Tensor, call: BlockCall, groups: Sequence[Sequence[LinearLayer]], whole: bool
    ) -> _Recorded:
        """Run ``block`` and record the inputs of each group; record the block's output if ``whole`` is true."""
        recorded = _Recorded([[] for _ in groups])
        with unstacked_experts(block), ExitStack() as stack:
            layers = {layer.name: layer for layer in linear_layers(block, self.name)}
            for place, group in enumerate(groups):
                hook = recorded.keep(place, stop=not whole and place == len(groups) - 1 and self.roles.in_order(groups))
                stack.callback(layers[group[0].name].module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            with suppress(StopForward):
                recorded.output = call.run(block, hidden)
        return recorded

    def _bar(self, pieces, hidden: Activations) -> tqdm:
        return tqdm(pieces, f"calibrating {self.name}", len(hidden.pieces), False, disable=None, unit="batch")


@dataclass
class _Recorded:
    """Tensors recorded in one forward pass of a block.

    Attributes:
        inputs: inputs of each group's layers, one for each call.
        output: output of the block; None if the pass stopped early.
    """

    inputs: list[list[Tensor]]
    output: Tensor | None = None

    def keep(self, place: int, stop: bool):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.inputs[place].append(args[0] if args else kwargs["input"])
            if stop:
                raise StopForward

        return hook


def narrow(rows: int, columns: int) -> bool:
    """Return whether the weight of a single layer more than halves the cost of its cross moments, see :class:`CrossMoments`."""
    return 4 * rows < columns


def empty_moments(group: Sequence[LinearLayer], device: torch.device | str, precision: Precision) -> InputMoments:
    """Return moments for the inputs of a group of layers."""
    dtype = torch.promote_types(group[0].weight.dtype, torch.float32)
    return InputMoments(group[0].columns, device=device, dtype=dtype, precision=precision)


class Clock:
    """Measures the time that a device spends inside the context, without synchronizing it."""

    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"
        self.marks: list[Any] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the total so far. The device must be synchronized first."""
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(start.elapsed_time(end) / 1000 if self.cuda else end - start for start, end in pairs)


def update_moments(moments: InputMoments, clock: Clock, stop: bool) -> Callable[..., None]:
    """Return a hook that adds a layer's inputs to ``moments``, and that ends the forward pass if ``stop`` is true."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        with clock:
            moments.update(args[0] if args else kwargs["input"])
        if stop:
            raise StopForward

    return hook
