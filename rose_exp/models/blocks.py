"""Finding a decoder's blocks and linear layers by structure, without code for individual model families."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..runtime.errors import RoseExpError, suggest
from .experts import Projection, projections, routers


@dataclass(frozen=True)
class LinearLayer:
    """A layer y = W x + b of a model.

    Attributes:
        name: full name in the model, such as ``model.layers.0.self_attn.q_proj``.
        module: an ``nn.Linear``, whose weight is W; a ``Conv1D`` of GPT-2, whose weight is Wᵀ; or a :class:`Projection`.
    """

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def of_expert(self) -> bool:
        """Whether the layer belongs to an expert and receives only the tokens routed to it."""
        return isinstance(self.module, Projection) or bool(re.search(r"(^|\.)experts\.\d+\.", self.name))

    @property
    def weight(self) -> Tensor:
        """View of W, (rows, columns) = (outputs, inputs)."""
        return self.module.weight.detach().T if self.transposed else self.module.weight.detach()

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    def set_weight(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.module.weight.copy_(weight.T if self.transposed else weight)


@dataclass(frozen=True)
class BlockList:
    """The blocks of a decoder, in execution order.

    Attributes:
        name: full name of the list in the model, such as ``model.layers``.
    """

    name: str
    blocks: list[nn.Module]

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"


def linear_layers(module: nn.Module, name: str) -> list[LinearLayer]:
    """Return all linear layers inside ``module``, whose full name is ``name``, including each expert's but no routers."""
    layers, left_out = [], routers(module)
    for inner, layer in module.named_modules():
        full = f"{name}.{inner}" if inner else name
        if isinstance(layer, (nn.Linear, Conv1D)) and layer not in left_out:
            layers.append(LinearLayer(full, layer))
        for expert, parts in enumerate(projections(layer)):
            layers += [LinearLayer(f"{full}.{expert}.{part}", projection) for part, projection in parts.items()]
    return layers


def find_blocks(model: nn.Module, name: str | None = None) -> BlockList:
    """Find the ``nn.ModuleList`` of the decoder's blocks.

    Multimodal models have further lists, of their vision and audio towers, which do not count.

    Args:
        name: full name of the list; None for the outermost list of the decoder with the most linear weights.
    Raises:
        RoseExpError: there is no such list, or several are equally large.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(linear_layers(block, "") for block in module)
    }
    if name is not None:
        if name not in lists:
            raise RoseExpError(f"model.blocks: expected one of {', '.join(lists)}, got {name!r}{suggest(name, lists)}")
        return BlockList(name, list(lists[name]))
    inside = _decoder_name(model)
    lists = {path: module for path, module in lists.items() if path.startswith(inside)} or lists
    outer = {path: m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    sizes = {path: sum(layer.weight.numel() for layer in linear_layers(m, "")) for path, m in outer.items()}
    if not sizes:
        raise RoseExpError(f"{type(model).__name__} has no list of blocks with linear layers to prune")
    largest = max(sizes.values())
    candidates = [path for path, size in sizes.items() if size == largest]
    if len(candidates) > 1:
        raise RoseExpError(f"model.blocks: expected the name of one of the lists {', '.join(candidates)}, all equally large")
    return BlockList(candidates[0], list(outer[candidates[0]]))


def _decoder_name(model: nn.Module) -> str:
    """Return the name of the text decoder inside a multimodal model, with a trailing dot; an empty string if there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = [name for name, module in model.named_modules() if module is decoder and name]
    return f"{names[0]}." if names else ""


def all_linear_layers(blocks: BlockList) -> list[LinearLayer]:
    """Return the linear layers of all blocks, in block order."""
    return [layer for i, block in enumerate(blocks.blocks) for layer in linear_layers(block, blocks.block_name(i))]
