"""Pruning of models whose blocks do not form a chain: each block is calibrated by forward passes of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models import BlockList, all_linear_layers, find_blocks, linear_layers, shared_layers, unstacked_experts
from ..runtime.batches import batch_size
from ..runtime.errors import RoseExpError
from .calls import to_device
from .capture import LayerInputs, add_unreached_experts, check_decoder, home_of, intercept_blocks
from .collect import Calibration, GroupInputs, empty_moments, update_moments
from .components import components_for
from .context import PruneContext
from .loop import Pruner, save_part
from .perturbation import perturbed
from .plan import PruningPlan, check_plan
from .report import LayerReport
from .unit import Unit
from .weights import BlockWeights, InMemory, fill


@contextmanager
def running_blocks(weights: BlockWeights, device: torch.device | str, loaded: int | None = None) -> Iterator[None]:
    """Make a model load each block when it is called, and run it on ``device`` through the layers of its experts.

    Args:
        loaded: index of a block that is already on the device.
    """

    def run(index: int, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        home = next((value.device for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), torch.device("cpu"))
        args, kwargs = to_device((args, kwargs), device, {})
        with nullcontext() if index == loaded else weights.at(index, device), unstacked_experts(block):
            return to_device(forward(*args, **kwargs), home, {})

    with intercept_blocks(weights.blocks, run):
        yield


class ModelPruner(Pruner):
    """Prunes the blocks of a model in the order of their lists, each calibrated by forward passes of the whole model.

    The earlier blocks are then already pruned, as in :class:`rose_exp.pruning.blocks.BlockPruner`. A block that the model calls
    several times is calibrated on the inputs of all calls, which depend on itself and on later blocks with dense weights. The
    cost grows with the square of the number of blocks.
    """

    kind = "block"

    def __init__(self, model: nn.Module, tokens: Tensor, plan: PruningPlan, context: PruneContext):
        settings = {"target": plan.target, "allocation": plan.allocation, "reconstruction": plan.reconstruction}
        settings |= {"pipeline.permute": plan.permutes}
        for setting, used in settings.items():
            if used:
                raise RoseExpError(f"{setting}: expected a model whose blocks form a chain, got {type(model).__name__}")
        super().__init__(plan, context, components_for(plan, context))
        self.model = model
        self.tokens = context.ranks.share(tokens)
        self.blocks: BlockList = context.weights.blocks if context.weights is not None else find_blocks(model, plan.blocks)
        self.weights = context.weights or InMemory(self.blocks)
        check_plan(self.blocks, plan)
        self.check(layer for layer in all_linear_layers(self.blocks) if plan.wants(layer.name))
        self.groups: list[list[list[str]]] = [[] for _ in self.blocks.blocks]  # layers by shared input, in call order
        with running_blocks(self.weights, context.device):
            check_decoder(model, tokens)
        self._probe(tokens[:1])

    @torch.no_grad()
    def _probe(self, tokens: Tensor) -> None:
        """Run the model on a window to find which layers of each block share their inputs."""
        inputs: dict[int, LayerInputs] = {}
        shared = shared_layers(self.model, self.blocks)
        self.context.warn("left_dense", sorted(shared), "each is shared by several blocks")

        def run(index: int, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            found = inputs.setdefault(index, LayerInputs())
            with ExitStack() as hooks:
                for layer in linear_layers(block, self.blocks.block_name(index)):
                    if layer.name not in shared:
                        hook = layer.module.register_forward_pre_hook(found.record(layer.name), with_kwargs=True)
                        hooks.callback(hook.remove)
                return forward(*args, **kwargs)

        with running_blocks(self.weights, self.context.device), intercept_blocks(self.blocks, run):
            self.model(input_ids=tokens.to(home_of(self.model)), use_cache=False)
        for index, found in inputs.items():
            found.separate_repeated()
            names = [layer.name for layer in linear_layers(self.blocks.blocks[index], self.blocks.block_name(index))]
            add_unreached_experts(found.groups, names)
            self.groups[index] = found.groups
        used = {name for groups in self.groups for group in groups for name in group}
        names = [layer.name for layer in all_linear_layers(self.blocks) if self.plan.wants(layer.name)]
        self.context.warn("left_dense", [name for name in names if name not in used | shared], "each is never called")
        if not used & set(names):
            raise RoseExpError("pipeline.layers, pipeline.skip: expected at least one layer that can be calibrated, got none")

    def modules(self) -> Iterator[tuple[nn.Module, str]]:
        yield from zip(self.blocks.blocks, self.blocks.names, strict=True)

    @property
    def units(self) -> int:
        return len(self.blocks.blocks)

    @contextmanager
    def unit(self, index: int) -> Iterator[Unit]:
        with self.weights.at(index, self.context.device) as block:
            name, state = self.blocks.block_name(index), self.context.state
            layers = {layer.name: layer for layer in linear_layers(block, name)}
            groups = [[layers[name] for name in group if self.plan.wants(name)] for group in self.groups[index]]
            part = state.part() if state is not None and state.progress.blocks == index else ([], {})
            yield Unit(index, name, block, name, self.plan, layers, [group for group in groups if group], part)

    def calibrate(self, unit: Unit, calibration: Calibration) -> list[GroupInputs]:
        groups, plan, device = calibration.groups, self.plan, self.context.device
        inputs = [GroupInputs(empty_moments(group, device, plan.precision)) for group in groups]
        if not groups:
            return inputs
        with running_blocks(self.weights, device, loaded=unit.index), unstacked_experts(unit.module), ExitStack() as hooks:
            for group, group_inputs in zip(groups, inputs, strict=True):
                hook = update_moments(group_inputs.moments, calibration.clock, stop=False)
                hooks.callback(group[0].module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            hooks.enter_context(perturbed(self.model, plan.replicate))
            batches = self.tokens.split(batch_size(plan.batch, device))
            for batch in tqdm(batches, f"calibrating {unit.name}", leave=False, disable=None, unit="batch"):
                self.context.check_stop_between_batches()
                self.model(input_ids=batch.to(home_of(self.model)), use_cache=False)
        return inputs

    def commit(self, unit: Unit, reports: Sequence[LayerReport]) -> None:
        self.context.state.commit(unit.index, unit.module, [], reports, vars(self.context.seconds))

    def restore(self, count: int) -> None:
        if isinstance(self.weights, InMemory):
            for index in range(count):
                fill(self.blocks.blocks[index], self.context.state.block(index))
        self.context.state.restore_generators()

    def stop_inside(self, unit: Unit, reports: Sequence[LayerReport]) -> None:
        save_part(self, unit, reports)
