"""Which layers of a block add to the hidden states, found by what the block answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..models import LinearLayer

NEAR = 1e-3  # relative; in half precision four times its rounding


@torch.no_grad()
def adding_layers(run: Callable[[Tensor], Tensor], layers: list[LinearLayer], hidden: Tensor) -> list[str]:
    """Names of the layers whose output the block adds to the hidden states as it is: attention's and the MLP's last, but in
    models that normalise or scale it first.

    While every layer as tall as the hidden states are wide answers with zeros, a block answers with what it was given; when one
    of them answers with something else, with what it was given and that.

    Args:
        run: the block, from hidden states to hidden states.
        layers: of the block.
        hidden: some real hidden states that enter the block, (windows, tokens, width).
    """
    width, near = hidden.shape[-1], max(NEAR, 4 * torch.finfo(hidden.dtype).eps)
    answers: dict[str, Tensor] = {}
    found = []
    with ExitStack() as stack:
        candidates = [layer for layer in layers if layer.weight.shape[0] == width]
        for layer in candidates:
            stack.callback(layer.module.register_forward_hook(_in_place(answers, layer.name)).remove)
        for layer in candidates:
            if layer.of_expert:  # sees some tokens only
                continue
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(hidden.shape, generator=generator).to(hidden) * hidden.float().std().to(hidden)
            answers.clear()
            answers[layer.name] = noise
            added = run(hidden) - hidden
            if torch.isfinite(added).all() and (added - noise).float().norm() <= near * noise.float().norm():
                found.append(layer.name)
    return found


def _in_place(answers: dict[str, Tensor], name: str):
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Tensor:
        noise = answers.get(name)
        return torch.zeros_like(output) if noise is None else noise.view(output.shape)

    return hook
