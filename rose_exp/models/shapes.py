"""Sizes of a model, computed from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ..runtime.errors import RoseExpError
from ..settings.schema import ModelSettings
from .blocks import all_linear_layers, find_blocks, linear_layers
from .loading import build_empty, from_pretrained

CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")  # names of the maximum sequence length


@dataclass(frozen=True)
class LayerShape:
    """Shape of a prunable layer.

    Attributes:
        group: key shared by layers of one parent module with equally many columns, a superset of those that share an input.
    """

    rows: int
    columns: int
    group: str


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        parameters: number of parameters of the model.
        outside: number of parameters outside the blocks.
        largest: number of parameters of the largest block.
        layers: (rows, columns) of each prunable layer of all blocks.
        block: layers of the largest block, in module order.
        hidden: width of the hidden states.
        widest: the widest input or output of a layer.
        tokens: number of rows of the embedding, which bounds the token IDs.
        context: maximum sequence length; None if the model has none.
    """

    parameters: int
    outside: int
    largest: int
    dtype: torch.dtype
    layers: list[tuple[int, int]]
    block: list[LayerShape]
    blocks: int
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
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks.blocks]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    layers = [tuple(layer.weight.shape) for layer in all_linear_layers(blocks)]
    text = config.get_text_config()
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        outside=sum(parameter.numel() for parameter in model.parameters()) - sum(sizes),
        largest=sizes[largest],
        dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype)),
        layers=layers,
        block=[
            LayerShape(*layer.weight.shape, f"{layer.name.rpartition('.')[0]} {layer.columns}")
            for layer in linear_layers(blocks.blocks[largest], "")
        ],
        blocks=len(blocks.blocks),
        hidden=text.hidden_size,
        widest=max(max(shape) for shape in layers),
        vocabulary=text.vocab_size,
        tokens=_embedding_rows(model, text.vocab_size),
        context=context_length(config),
    )


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the maximum sequence length of a model, or None if it has none."""
    text = config.get_text_config()
    lengths = [getattr(text, name, None) for name in CONTEXT]
    return next((length for length in lengths if isinstance(length, int)), None)


def _embedding_rows(model: nn.Module, vocabulary: int) -> int:
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # a model with its own code
        return vocabulary
