"""A slow reference for pruning by blocks: every forward pass runs the whole model, window by window."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from rose_exp.engine import InputMoments
from rose_exp.models import find_blocks, linear_layers, unstacked_experts
from rose_exp.pruning import PruningPlan


@torch.no_grad()
def prune_whole(model: nn.Module, tokens: Tensor, plan: PruningPlan, names: set[str]) -> None:
    """Prune the layers ``names`` of a model in place, block after block.

    The moments of a block's inputs come from forward passes of the whole model, whose earlier blocks are already pruned.
    """
    blocks = find_blocks(model, plan.blocks)
    for index, block in enumerate(blocks.blocks):
        layers = [layer for layer in linear_layers(block, blocks.block_name(index)) if layer.name in names]
        moments = {layer.name: InputMoments(layer.columns) for layer in layers}
        with ExitStack() as hooks, unstacked_experts(model):
            for layer in layers:
                hooks.callback(layer.module.register_forward_pre_hook(_update(moments[layer.name]), with_kwargs=True).remove)
            for window in tokens:
                model(input_ids=window[None], use_cache=False)
        for layer in layers:
            moments[layer.name].finish()
            if not layer.of_expert or moments[layer.name].tokens >= plan.expert_tokens:
                plan.solve([layer], moments[layer.name])


@torch.no_grad()
def whole_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of all windows, (windows, tokens, vocabulary), one window at a time."""
    return torch.cat([model(input_ids=window[None], use_cache=False).logits for window in tokens])


def _update(moments: InputMoments):
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        moments.update(args[0] if args else kwargs["input"])

    return hook
