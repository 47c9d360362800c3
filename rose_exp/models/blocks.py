"""Finding a decoder's blocks and linear layers by structure, without code for individual model families."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

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
        return isinstance(self.module, Projection) or bool(re.search(r"(^|\.)experts\.\d+(\.|$)", self.name))

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
        name: full name of the list in the model, such as ``model.layers``; several names are separated by commas.
        names: full name of each block.
    """

    name: str
    names: list[str]
    blocks: list[nn.Module]

    @classmethod
    def of(cls, lists: Mapping[str, nn.ModuleList]) -> BlockList:
        """Return the blocks of one or several lists by full name."""
        names = [f"{name}.{index}" for name, blocks in lists.items() for index in range(len(blocks))]
        return cls(",".join(lists), names, [block for blocks in lists.values() for block in blocks])

    def block_name(self, index: int) -> str:
        return self.names[index]

    def index_of(self, tensor: str) -> int | None:
        """Return the index of the block that contains a tensor, by full name; None if it is outside the blocks."""
        dots = [place for place, letter in enumerate(tensor) if letter == "."]
        return next((self._indices[tensor[:dot]] for dot in dots if tensor[:dot] in self._indices), None)

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}


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

    Multimodal models have further lists, of their vision and audio towers, which do not count. Lists of equal size are pruned
    together, such as the two stacks of HRM.

    Args:
        name: full name of the list, or several names separated by commas; None for the outermost list of the decoder with the
            most linear weights.
    Raises:
        RoseExpError: there is no such list.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(linear_layers(block, "") for block in module)
    }
    if name is not None:
        names = [part.strip() for part in name.split(",")]
        unknown = [part for part in names if part not in lists]
        if unknown:
            raise RoseExpError(
                f"model.blocks: expected one of {', '.join(lists)}, got {unknown[0]!r}{suggest(unknown[0], lists)}"
            )
        return BlockList.of({part: lists[part] for part in names})
    inside = _decoder_name(model)
    lists = {path: module for path, module in lists.items() if path.startswith(inside)} or lists
    outer = {path: m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    sizes = {path: sum(layer.weight.numel() for layer in linear_layers(m, "")) for path, m in outer.items()}
    if not sizes:
        raise RoseExpError(f"{type(model).__name__} has no list of blocks with linear layers to prune")
    largest = max(sizes.values())
    return BlockList.of({path: outer[path] for path, size in sizes.items() if size == largest})


def _decoder_name(model: nn.Module) -> str:
    """Return the name of the text decoder inside a multimodal model, with a trailing dot; an empty string if there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = [name for name, module in model.named_modules() if module is decoder and name]
    return f"{names[0]}." if names else ""


def all_linear_layers(blocks: BlockList) -> list[LinearLayer]:
    """Return the linear layers of all blocks, in block order."""
    return [layer for i, block in enumerate(blocks.blocks) for layer in linear_layers(block, blocks.block_name(i))]


def shared_layers(model: nn.Module, blocks: BlockList) -> set[str]:
    """Return the names of the linear layers whose weight belongs to several blocks, as in Zamba.

    Such a layer has different inputs in each block.
    """
    owners: dict[object, set[int]] = {}
    names: dict[object, list[str]] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        index = blocks.index_of(name)
        if index is not None:
            for key in {id(parameter), tied.get(name, name)}:
                owners.setdefault(key, set()).add(index)
                names.setdefault(key, []).append(name.removesuffix(".weight"))
    linear = {layer.name for layer in all_linear_layers(blocks)}
    return linear & {name for key, indices in owners.items() if len(indices) > 1 for name in names[key]}
