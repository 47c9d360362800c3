"""The walk through a model: for each block a dense pass that collects moments, pruning, and a pass with the pruned weights
that makes the next block's inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engine import InputMoments, Method, NotPositiveDefiniteError, Ordering, PruneResult, Sparsity, prune_layer
from ..engine.kernels import Backend
from ..errors import RoseExpError, suggest
from ..models import BlockList, LinearLayer, all_linear_layers, find_blocks, linear_layers
from .capture import BlockCall, _Enough, capture_calls, first_inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruningPlan:
    """What to do with each layer.

    Attributes:
        method: for all layers, or those of no pattern in ``methods``.
        methods: for layers whose full name matches a pattern; the first that matches counts.
        layers, skip: patterns of full layer names to prune, and of those to leave dense all the same.
        true_sequential: prune the layers of a block group by group, in the order that they are called, each group with
            moments of inputs that the groups before, already pruned, have made.
        batch: windows that run through a block at once.
        blocks: name of the list of blocks; None: found by structure.
    """

    method: Method
    sparsity: Sparsity
    ordering: Ordering | None = None
    methods: Mapping[str, Method] = field(default_factory=dict)
    block_size: int = 128
    damping: float = 0.01
    refine: int = 0
    backend: Backend = "auto"
    layers: Sequence[str] = ("*",)
    skip: Sequence[str] = ()
    true_sequential: bool = False
    batch: int = 4
    blocks: str | None = None

    def wants(self, name: str) -> bool:
        return chosen(name, self.layers, self.skip)

    def method_for(self, name: str) -> Method:
        return next((method for pattern, method in self.methods.items() if fnmatchcase(name, pattern)), self.method)


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer, for the record.

    ``sparsity`` is the measured share of zeros; ``seconds`` is for solving, without the passes through the block.
    """

    name: str
    rows: int
    columns: int
    tokens: int
    sparsity: float
    error: float
    relative_range: float
    reordered: bool
    damping: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@torch.no_grad()
def prune_model(
    model: nn.Module,
    tokens: Tensor,
    plan: PruningPlan,
    device: torch.device | str = "cpu",
    on_layer: Callable[[LayerReport], None] | None = None,
) -> list[LayerReport]:
    """Prune ``model`` in place, block by block.

    Args:
        model: a decoder on the CPU; each block visits ``device`` while it is worked on.
        tokens: calibration windows, (windows, length) int64.
        on_layer: called with each layer's report as soon as it is pruned.

    Returns:
        A report for every pruned layer, in the order of pruning.
    Raises:
        RoseExpError: the plan fits the model nowhere, or a layer cannot be pruned; the message names the layer.
    """
    blocks = find_blocks(model, plan.blocks)
    check_plan(blocks, plan)
    batches = tokens.split(plan.batch)
    calls = {len(batch): capture_calls(model, blocks, batch) for batch in {len(b): b for b in batches}.values()}
    hidden = [first_inputs(model, blocks, batch) for batch in batches]
    _check_called(blocks, calls[len(batches[0])], plan)

    reports = []
    for index, block in enumerate(tqdm(blocks.blocks, desc="pruning", unit="block", disable=None)):
        block.to(device)
        walk = _BlockWalk(block, blocks.block_name(index), {size: c[index] for size, c in calls.items()}, plan, device)
        for report in walk.prune(hidden):
            reports.append(report)
            if on_layer is not None:
                on_layer(report)
        if index + 1 < len(blocks.blocks):  # nothing needs the last block's outputs
            hidden = [walk.run(batch).cpu() for batch in hidden]
        block.to("cpu")
        log.info("pruned %s (%d of %d)", blocks.block_name(index), index + 1, len(blocks.blocks))
    return reports


def check_plan(blocks: BlockList, plan: PruningPlan) -> None:
    """Check the plan's patterns against the model's layers.

    Raises:
        RoseExpError: a pattern that matches no layer, nothing left to prune, or weights that are no linear layers.
    """
    names = [layer.name for layer in all_linear_layers(blocks)]
    for setting, patterns in (("layers", plan.layers), ("skip", plan.skip)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                expected = f"a pattern of layer names such as {names[0]!r}"
                raise RoseExpError(
                    f"pipeline.{setting}: expected {expected}, got {pattern!r}, which matches none{suggest(pattern, names)}"
                )
    if not any(plan.wants(name) for name in names):
        raise RoseExpError("pipeline.layers, pipeline.skip: expected to leave a layer to prune, got none")
    for index, block in enumerate(blocks.blocks):
        for name, parameter in block.named_parameters():
            full = f"{blocks.block_name(index)}.{name}"
            if parameter.ndim > 2 and plan.wants(full):
                raise RoseExpError(
                    f"{full} of shape {tuple(parameter.shape)} is no linear layer (stacked experts?) and cannot be pruned; "
                    f"name it in pipeline.skip to leave it dense"
                )


def _check_called(blocks: BlockList, calls: Sequence[BlockCall], plan: PruningPlan) -> None:
    for index, (block, call) in enumerate(zip(blocks.blocks, calls, strict=True)):
        called = {name for group in call.layers for name in group}
        for layer in linear_layers(block, blocks.block_name(index)):
            if plan.wants(layer.name) and layer.name not in called:
                raise RoseExpError(f"{layer.name} is never called, so it cannot be calibrated; name it in pipeline.skip")


class _BlockWalk:
    """One block while it is pruned."""

    def __init__(
        self, block: nn.Module, name: str, calls: Mapping[int, BlockCall], plan: PruningPlan, device: torch.device | str
    ):
        self.block, self.name, self.calls, self.plan, self.device = block, name, calls, plan, device
        layers = {layer.name: layer for layer in linear_layers(block, name)}
        order = next(iter(calls.values())).layers
        groups = [[layers[name] for name in group if plan.wants(name)] for group in order]
        self.groups = [group for group in groups if group]  # of layers that share their input

    def run(self, hidden: Tensor) -> Tensor:
        return self.calls[len(hidden)].run(self.block, hidden.to(self.device))

    def prune(self, hidden: Sequence[Tensor]) -> Iterator[LayerReport]:
        stages = [[group] for group in self.groups] if self.plan.true_sequential else [self.groups]
        for groups in stages:
            moments = self._collect(groups, hidden)
            for group, of_group in zip(groups, moments, strict=True):
                for layer in group:
                    yield self._prune_layer(layer, of_group)

    def _collect(self, groups: Sequence[Sequence[LinearLayer]], hidden: Sequence[Tensor]) -> list[InputMoments]:
        """Moments of the inputs of each group, from one pass that stops where the last group is reached."""
        moments = [
            InputMoments(g[0].columns, device=self.device, dtype=torch.promote_types(g[0].weight.dtype, torch.float32))
            for g in groups
        ]
        if not groups:
            return moments
        with ExitStack() as stack:
            for group, of_group in zip(groups, moments, strict=True):
                hook = _update(of_group, last=group is groups[-1])
                stack.callback(group[0].module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for batch in tqdm(hidden, desc=f"calibrating {self.name}", unit="batch", disable=None, leave=False):
                with suppress(_Enough):
                    self.run(batch)
        return moments

    def _prune_layer(self, layer: LinearLayer, moments: InputMoments) -> LayerReport:
        start = time.perf_counter()
        plan = self.plan
        try:
            result: PruneResult = prune_layer(
                layer.weight,
                moments,
                method=plan.method_for(layer.name),
                sparsity=plan.sparsity,
                ordering=plan.ordering,
                block_size=plan.block_size,
                damping=plan.damping,
                refine=plan.refine,
                backend=plan.backend,
            )
        except (ValueError, NotPositiveDefiniteError) as error:
            raise RoseExpError(f"{layer.name}: {error}") from error
        layer.set_weight(result.weight)
        if result.damping > plan.damping:
            log.warning("%s: damping raised from %g to %g", layer.name, plan.damping, result.damping)
        rows, columns = result.weight.shape
        return LayerReport(
            name=layer.name,
            rows=rows,
            columns=columns,
            tokens=moments.tokens,
            sparsity=float((result.weight == 0).float().mean()),
            error=result.error,
            relative_range=result.relative_range,
            reordered=result.reordered,
            damping=result.damping,
            seconds=time.perf_counter() - start,
        )


def _update(moments: InputMoments, last: bool):
    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        moments.update(args[0] if args else kwargs["input"])
        if last:
            raise _Enough

    return hook


def chosen(name: str, layers: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether a layer of this full name matches a pattern of ``layers`` and none of ``skip``."""
    return any(fnmatchcase(name, p) for p in layers) and not any(fnmatchcase(name, p) for p in skip)
