"""Sizes of a model, computed from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ..runtime.errors import RoseExpError
from ..settings.schema import ModelSettings
from .blocks import BlockList, LinearLayer, all_linear_layers, find_blocks, linear_layers
from .heads_and_neurons import find_structures
from .loading import build_empty, from_pretrained

CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")  # names of the maximum sequence length


@dataclass(frozen=True)
class LayerShape:
    """Shape of a prunable layer.

    Attributes:
        group: key shared by the layers of one parent module that read the same input: those with equally many columns, except
            the last one if its output has the width of the hidden states, such as attention's output projection.
        name: full name of the layer in the model.
    """

    rows: int
    columns: int
    group: str
    name: str = ""


@dataclass(frozen=True)
class StructureShape:
    """Sizes of the heads of an attention or the neurons of an FFN.

    Attributes:
        groups: number of heads, or groups of heads that share a key and value, or neurons.
        parameters: number of parameters that belong to each group.
        consumers: names of the layers that read the groups.
    """

    kind: Literal["heads", "neurons"]
    groups: int
    parameters: int
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block: its number of parameters, its layers in module order, and the structures in a known layout."""

    parameters: int
    layers: list[LayerShape]
    structures: list[StructureShape] = field(default_factory=list)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        parameters: number of parameters of the model.
        outside: number of parameters outside the blocks.
        blocks: sizes of the blocks.
        hidden: width of the hidden states.
        widest: the widest input or output of a layer.
        tokens: number of rows of the embedding, which bounds the token IDs.
        context: maximum sequence length; None if the model has none.
    """

    parameters: int
    outside: int
    dtype: torch.dtype
    blocks: list[BlockShape]
    hidden: int
    widest: int
    vocabulary: int
    tokens: int
    context: int | None

    def check_tokens(self, where: str, largest: int) -> None:
        """Raise RoseExpError if the embedding has no row for the token ID ``largest``, the largest one that ``where`` needs."""
        if largest >= self.tokens:
            raise RoseExpError(
                f"{where}: expected token IDs below {self.tokens}, the number of rows of the model's embedding, got {largest}; "
                "does the tokenizer belong to the model?"
            )

    @property
    def largest(self) -> int:
        """Number of parameters of the largest block."""
        return max(block.parameters for block in self.blocks)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(rows, columns) of each prunable layer of all blocks."""
        return [(layer.rows, layer.columns) for block in self.blocks for layer in block.layers]


def model_shape(settings: ModelSettings) -> ModelShape:
    """Return the sizes of a model without reading its weights.

    Raises:
        RoseExpError: its configuration cannot be loaded.
    """
    if settings.kind == "diffusion":
        raise RoseExpError("no estimate is made for diffusion models")
    config = from_pretrained(AutoConfig, settings)
    dtype = getattr(config, "dtype", None) or torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return shape_of(config, dtype, settings)


def shape_of(config: PreTrainedConfig, dtype: torch.dtype | str, settings: ModelSettings) -> ModelShape:
    """Return the sizes of the model that a configuration describes, stored in ``dtype``."""
    with torch.device("meta"):
        model = build_empty(config, settings)
    blocks = find_blocks(model, settings.blocks)
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", None) or _widest_output(blocks)
    shapes = [
        BlockShape(
            sum(parameter.numel() for parameter in block.parameters()),
            _layers(linear_layers(block, blocks.block_name(index)), hidden),
            _structures(block, blocks.block_name(index)),
        )
        for index, block in enumerate(blocks.blocks)
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(
        parameters=parameters,
        outside=parameters - sum(block.parameters for block in shapes),
        dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype)),
        blocks=shapes,
        hidden=hidden,
        widest=max(max(layer.rows, layer.columns) for block in shapes for layer in block.layers),
        vocabulary=text.vocab_size,
        tokens=embedding_rows(model, text.vocab_size),
        context=context_length(config),
    )


def _structures(block: nn.Module, name: str) -> list[StructureShape]:
    """Return the shapes of the structures of a block, without the kinds that it has in an unknown layout."""
    shapes = []
    for kind in ("heads", "neurons"):
        try:
            structures = find_structures(block, name, (kind,))
        except RoseExpError:  # a run that removes such structures raises it; all others need no sizes
            continue
        for structure in structures:
            consumers = tuple(part.layer.name for part in structure.consumers)
            shapes.append(StructureShape(kind, structure.groups, structure.parameters, consumers))
    return shapes


def _widest_output(blocks: BlockList) -> int:
    """Return the width of the hidden states of a model whose configuration does not name it, such as BLT: at most this."""
    return max(len(layer.weight) for layer in all_linear_layers(blocks))


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the maximum sequence length of a model, or None if it has none."""
    text = config.get_text_config()
    lengths = [getattr(text, name, None) for name in CONTEXT]
    return next((length for length in lengths if isinstance(length, int)), None)


def embedding_rows(model: nn.Module, vocabulary: int | None = None) -> int | None:
    """Return the number of rows of a model's input embeddings, or ``vocabulary`` if they are not known."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # a model with its own code
        return vocabulary


def _layers(layers: Sequence[LinearLayer], hidden: int) -> list[LayerShape]:
    """Return the shapes of the layers of a block, grouped by shared input."""
    groups: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        groups.setdefault(f"{layer.name.rpartition('.')[0]} {layer.columns}", []).append(layer)
    alone = {group[-1].name for group in groups.values() if len(group) > 1 and len(group[-1].weight) == hidden}
    return [
        LayerShape(
            *layer.weight.shape,
            layer.name if layer.name in alone else f"{layer.name.rpartition('.')[0]} {layer.columns}",
            layer.name,
        )
        for layer in layers
    ]
