"""Regression targets, computed from the hidden states of the dense and the pruned model, and the layers that use them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models import LinearLayer
from .component import Component

if TYPE_CHECKING:
    from .blocks import BlockPruner, BlockUnit
    from .collect import Calibration, GroupInputs
    from .context import PruneContext
    from .plan import PruningPlan

NEAR = 1e-3  # relative tolerance; at least four times the dtype's epsilon


@torch.no_grad()
def adding_layers(run: Callable[[Tensor], Tensor], layers: list[LinearLayer], hidden: Tensor) -> list[str]:
    """Return the names of the layers whose output the block adds to the hidden states unchanged.

    These are the last layers of attention and MLP, except in models that normalize or scale their output first. The test
    replaces the outputs of all layers with as many rows as the hidden states have channels: by noise in one layer, and by
    zeros in the others. If the block adds that layer's output, it returns its input plus the noise.

    Args:
        run: forward pass of the block, from hidden states to hidden states.
        layers: linear layers of the block.
        hidden: real inputs of the block, (windows, tokens, width).
    """
    if hidden.ndim != 3:  # several streams: the block mixes its output into each of them
        return []
    width, near = hidden.shape[-1], max(NEAR, 4 * torch.finfo(hidden.dtype).eps)
    answers: dict[str, Tensor] = {}
    names = []
    with ExitStack() as stack:
        candidates = [layer for layer in layers if layer.weight.shape[0] == width]
        for layer in candidates:
            stack.callback(layer.module.register_forward_hook(_replace_output(answers, layer.name)).remove)
        for layer in candidates:
            if layer.of_expert:  # receives only some of the tokens
                continue
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(hidden.shape, generator=generator).to(hidden) * hidden.float().std().to(hidden)
            answers.clear()
            answers[layer.name] = noise
            added = run(hidden) - hidden
            if torch.isfinite(added).all() and (added - noise).float().norm() <= near * noise.float().norm():
                names.append(layer.name)
    return names


def _replace_output(answers: dict[str, Tensor], name: str):
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Tensor:
        noise = answers.get(name)
        return torch.zeros_like(output) if noise is None else noise.view(output.shape)

    return hook


class RegressionTargets(Component):
    """Collects cross moments with the dense model's inputs, from which the plan's regression target is computed."""

    def __init__(self):
        self.pruner: BlockPruner | None = None
        self.dense_block: nn.Module | None = None

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> RegressionTargets | None:
        return cls() if plan.target else None

    def before_model(self, pruner: BlockPruner) -> None:
        self.pruner = pruner
        pruner.dense = pruner.hidden.copy(pruner.folder / "dense")

    def before_unit(self, unit: BlockUnit) -> None:
        several = unit.plan.true_sequential or len(self.pruner.waves(unit.groups)) > 1
        self.dense_block = copy.deepcopy(unit.module) if several else unit.module

    def collect(self, unit: BlockUnit, calibration: Calibration) -> list[GroupInputs]:
        return unit.collector.pairs(calibration, self.pruner.hidden, self.pruner.dense, self.dense_block)

    def after_unit(self, unit: BlockUnit) -> None:
        self.dense_block = None
