"""Pruning of a language model, one decoder block after another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models import BlockList, all_linear_layers, find_blocks, linear_layers, shared_layers, unstacked_experts
from ..runtime.errors import RoseExpError
from ..runtime.files import scratch_folder
from .activations import Activations
from .calls import BlockCall
from .capture import NotAChain, Probe, probe
from .collect import Calibration, Collector, GroupInputs, Roles
from .component import Group
from .components import components_for
from .context import PruneContext
from .enter import Calls, enter, second_stream
from .loop import Pruner, save_part
from .permutation import Channels
from .perturbation import perturbed
from .plan import SUBSTANTIAL, PruningPlan, check_plan
from .report import LayerReport
from .unit import Unit
from .waves import limited_waves
from .weights import InMemory, fill
from .whole import ModelPruner

log = logging.getLogger(__name__)


@torch.no_grad()
def prune_model(model: nn.Module, tokens: Tensor, plan: PruningPlan, context: PruneContext | None = None) -> list[LayerReport]:
    """Prune a model block by block, in place or, if its blocks are not in memory, into ``context.state``.

    Args:
        model: a decoder on the CPU; each block moves to the context's device while it is processed.
        tokens: calibration windows of all ranks, (windows, length) int64.
        context: device, processes, files and callbacks; None for a CPU and nothing else.

    Returns:
        A report for every pruned layer, in pruning order.
    Raises:
        RoseExpError: the plan does not fit the model, or a layer cannot be pruned; the message names the layer.
        Interrupted: a stop was requested; finished blocks are in ``context.state``.
    """
    context = context or PruneContext()
    pruner = BlockPruner(model, plan, context)
    try:
        probed = pruner.probe(tokens)
    except NotAChain as error:
        reason = f"{error}; each block is calibrated by forward passes of the whole model"
        if context.on_warning is not None:
            context.on_warning("whole_passes", reason)
        return ModelPruner(model, tokens, plan, context).run()
    with scratch_folder(context.scratch) as folder:
        try:
            pruner.enter(tokens, probed, folder)
            return pruner.run()
        finally:
            pruner.release()


@dataclass
class BlockUnit(Unit):
    """A decoder block.

    Attributes:
        calls, dense_calls: arguments of the block for each batch, by the index of its first window, for the pruned and for the
            dense model's hidden states.
        channels: layers whose input channels can be permuted.
        called: all layers in call order.
        stages: see :meth:`BlockPruner.stages`.
        collector: collects the statistics of the layers' inputs.
    """

    calls: dict[int, BlockCall] = field(default_factory=dict)
    dense_calls: dict[int, BlockCall] = field(default_factory=dict)
    channels: list[Channels] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    collector: Collector | None = None


class BlockPruner(Pruner):
    """Prunes the blocks of a decoder, and passes the hidden states of all windows from block to block.

    Attributes:
        hidden: inputs of the next block for all windows of this rank.
        dense: the same of the dense model; None unless a component needs them.
        folder: temporary folder for activations on disk.
    """

    kind = "block"

    def __init__(self, model: nn.Module, plan: PruningPlan, context: PruneContext):
        super().__init__(plan, context, components_for(plan, context))
        self.model = model
        self.blocks: BlockList = context.weights.blocks if context.weights is not None else find_blocks(model, plan.blocks)
        self.weights = context.weights or InMemory(self.blocks)
        self.probed = Probe()
        self.hidden: Activations | None = None
        self.dense: Activations | None = None
        self.calls: Calls = {}
        self.dense_calls: Calls = {}
        self.folder = Path()
        context.warn("left_dense", check_plan(self.blocks, plan), "not linear layers, but convolutions or recurrences")
        self.check(layer for layer in all_linear_layers(self.blocks) if plan.wants(layer.name))

    def modules(self) -> Iterator[tuple[nn.Module, str]]:
        for index, block in enumerate(self.blocks.blocks):
            yield block, self.blocks.block_name(index)

    def probe(self, tokens: Tensor) -> Probe:
        """Find the structure of the blocks by a forward pass on a few tokens.

        Raises:
            RoseExpError: the model cannot be pruned block by block, or a layer to prune is never called.
        """
        plan, context = self.plan, self.context
        if len(tokens) < context.ranks.size:
            raise RoseExpError(
                f"calibration.samples: expected at least one window for each of {context.ranks.size} ranks, got {len(tokens)}"
            )
        adding = bool(plan.staged or (plan.target and plan.target.residual))
        probed = probe(self.model, self.blocks, tokens, context.device, self.weights, adding=adding, channels=plan.permutes)
        probed.channels = context.ranks.gather(probed.channels)[0]  # ranks may disagree through rounding
        self._check_calls(probed)
        if plan.permutes and not any(probed.channels):
            log.warning("pipeline.permute: this model has no layer with input channels that can be reordered")
        return probed

    def _check_calls(self, probed: Probe) -> None:
        """Warn of layers that stay dense because their block never calls them.

        Raises:
            RoseExpError: they hold a substantial share of a block's weights, and the block itself is called.
        """
        unused: list[str] = []
        skipped = [self.blocks.block_name(index) for index in range(len(probed.layers)) if index not in probed.called]
        shared = shared_layers(self.model, self.blocks)
        self.context.warn("left_dense", skipped, "each is a block that text does not run through")
        self.context.warn("left_dense", sorted(shared), "each is shared by several blocks")
        for (block, name), groups in zip(self.modules(), probed.layers, strict=True):
            if name in skipped:
                continue
            used = {name for group in groups for name in group}
            size = sum(parameter.numel() for parameter in block.parameters())
            for layer in linear_layers(block, name):
                if layer.name in used | shared or not self.plan.wants(layer.name):
                    continue
                if layer.weight.numel() > SUBSTANTIAL * size:
                    raise RoseExpError(f"{layer.name} is never called, so it cannot be calibrated; add it to pipeline.skip")
                unused.append(layer.name)
        self.context.warn("left_dense", unused, "each is never called")
        if not any(self.plan.wants(name) for groups in probed.layers for group in groups for name in group):
            raise RoseExpError("pipeline.layers, pipeline.skip: expected at least one layer that can be calibrated, got none")

    def enter(self, tokens: Tensor, probed: Probe, folder: Path) -> None:
        """Compute the inputs of the first block and the arguments of every block.

        Args:
            folder: temporary folder for activations on disk.
        Raises:
            RoseExpError: the inputs of the first block are not finite.
        """
        plan, device = self.plan, self.context.device
        share = self.context.ranks.share(tokens)
        self.probed, self.folder = probed, folder
        with perturbed(self.model, plan.replicate):
            self.hidden, self.calls = enter(
                self.model, self.blocks, share, plan.batch, plan.activations, probed, device, folder / "hidden"
            )
        self.dense_calls = second_stream(self.calls) if plan.dense_stream else self.calls
        for _, batch in self.hidden:
            if not torch.isfinite(batch).all():
                name = self.blocks.block_name(0)
                raise RoseExpError(f"{name}: expected finite inputs, got NaN or infinity: damaged embeddings")

    def release(self) -> None:
        """Free the hidden states and the arguments of the blocks, which components may still refer to."""
        self.hidden = self.dense = None
        self.calls, self.dense_calls = {}, {}

    @property
    def units(self) -> int:
        """Number of blocks up to the last one with a layer to prune."""
        has_targets = [any(self.plan.wants(name) for group in groups for name in group) for groups in self.probed.layers]
        return max(index for index, pruned in enumerate(has_targets) if pruned) + 1

    def stages(self, index: int) -> list[str]:
        """Return the layers of a block after which the stages of its reconstruction end, except the last stage.

        These add their output to the hidden states, as the last layer of attention does.
        """
        called = [name for group in self.probed.layers[index] for name in group]
        inner = set(self.probed.adding[index]) - set(called[-1:]) - set(self.probed.repeated)
        return [name for name in called if name in inner] if self.plan.staged else []

    @contextmanager
    def unit(self, index: int, original: bool = False) -> Iterator[BlockUnit]:
        """Yield a block on the device.

        Args:
            original: whether to use the checkpoint's weights even if the block is already pruned and saved.
        """
        with self.weights.at(index, self.context.device, original) as block:
            yield self._make_unit(index, block)

    def _make_unit(self, index: int, block: nn.Module) -> BlockUnit:
        name, probed, plan = self.blocks.block_name(index), self.probed, self.plan
        layers = {layer.name: layer for layer in linear_layers(block, name)}
        groups = [[layers[name] for name in group if plan.wants(name)] for group in probed.layers[index]]
        calls, dense_calls = (
            {start: batch[index] for start, batch in calls.items() if index in batch}
            for calls in (self.calls, self.dense_calls)
        )
        called = [name for group in probed.layers[index] for name in group]
        adding = probed.adding[index]
        closing = called[-1] if called and called[-1] in adding else None
        alone = [group[0] for group in probed.layers[index] if len(group) == 1]  # reordering would affect other readers
        alone = [name for name in alone if name not in probed.repeated]
        state, stop = self.context.state, self.context.check_stop_between_batches
        return BlockUnit(
            index,
            name,
            block,
            name,
            plan,
            layers,
            [group for group in groups if group],
            state.part() if state is not None and state.progress.blocks == index else ([], {}),
            calls,
            dense_calls,
            [layer_channels for layer_channels in probed.channels[index] if layer_channels.layer in alone],
            called,
            self.stages(index),
            Collector(
                block, name, (calls, dense_calls), plan, self.context.device, Roles(adding, closing, probed.repeated), stop
            ),
        )

    def waves(self, groups: Sequence[Group]) -> list[list[Group]]:
        if any(group[0].name in self.probed.repeated for group in groups):
            return [list(groups)]  # its last calls may read what later layers compute
        return limited_waves(groups, self.plan, self.context)

    def calibrate(self, unit: BlockUnit, calibration: Calibration) -> list[GroupInputs]:
        return unit.collector.moments(calibration, self.hidden)

    def propagate(self, unit: BlockUnit) -> None:
        if unit.index < self.units - 1:  # the last block's outputs are not used
            self.advance(unit, self.hidden)
        for call in [*unit.calls.values(), *unit.dense_calls.values()]:
            call.received.clear()

    def advance(self, unit: BlockUnit, hidden: Activations, weights: str = "pruned") -> None:
        """Run a block on all hidden states and replace them by its outputs.

        Args:
            weights: ``pruned`` or ``dense``, for the error message.
        Raises:
            RoseExpError: the block returns NaN or infinity.
        """
        if unit.index not in self.probed.called:
            return
        context, start = self.context, self.context.now()
        calls = unit.dense_calls if hidden is self.dense else unit.calls
        finite = torch.ones((), dtype=torch.bool, device=context.device)  # read once at the end, to synchronize once
        for windows, batch in tqdm(hidden, f"advancing {unit.name}", len(hidden.pieces), False, disable=None, unit="batch"):
            context.check_stop_between_batches()
            with unstacked_experts(unit.module):
                output = calls[windows.start].run(unit.module, batch)
            finite &= torch.isfinite(output).all()
            hidden[windows] = output
        if not finite:
            kind = str(output.dtype).removeprefix("torch.")
            raise RoseExpError(
                f"{unit.name}: expected finite outputs with {weights} weights, got NaN or infinity in {kind}, whose maximum is "
                f"{torch.finfo(output.dtype).max:.3g}; set model.dtype to float32 or bfloat16, which have a larger range"
            )
        context.seconds.advancing += context.now() - start

    def commit(self, unit: BlockUnit, reports: Sequence[LayerReport]) -> None:
        streams = self._streams() if unit.index < self.units - 1 else []
        self.context.state.commit(unit.index, unit.module, streams, reports, vars(self.context.seconds))

    def restore(self, count: int) -> None:
        """Restore the pruned blocks, the inputs of the next one and the generators.

        The state does not hold values that blocks pass on beside the hidden states. If there are any, the blocks run again.
        """
        state = self.context.state
        recompute = count < self.units and (self.probed.carries or not state.restore(self._streams()))
        if recompute and self.dense is not None:  # while the blocks in memory still hold their dense weights
            for index in tqdm(range(count), "running dense blocks again", unit="block", disable=None):
                with self.unit(index, original=True) as unit:
                    self.advance(unit, self.dense, "dense")
        if isinstance(self.weights, InMemory):
            for index in range(count):
                fill(self.blocks.blocks[index], state.block(index))
        if recompute:
            for index in tqdm(range(count), "running pruned blocks again", unit="block", disable=None):
                with self.unit(index) as unit:
                    self.advance(unit, self.hidden)
        state.restore_generators()

    def _streams(self) -> list[Activations]:
        return [stream for stream in (self.hidden, self.dense) if stream is not None]

    def stop_inside(self, unit: BlockUnit, reports: Sequence[LayerReport]) -> None:
        save_part(self, unit, reports)
