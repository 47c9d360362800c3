"""How large a model is, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..settings import ModelSettings
from .loading import from_pretrained
from .structure import all_linear_layers, find_blocks, linear_layers


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        layers: (rows, columns) of each prunable layer.
        inputs_of_block: columns of each of the first block's layers.
        hidden: columns of a hidden state.
        widest: the widest input or output of a layer.
    """

    parameters: int
    dtype: torch.dtype
    layers: list[tuple[int, int]]
    inputs_of_block: list[int]
    blocks: int
    hidden: int
    widest: int
    vocabulary: int


def model_shape(settings: ModelSettings) -> ModelShape:
    """Sizes of the model, no weight of which is read.

    Raises:
        RoseExpError: its configuration cannot be had.
    """
    config = from_pretrained(AutoConfig, settings)
    dtype = getattr(config, "dtype", None) or torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    blocks = find_blocks(model, settings.blocks)
    layers = [tuple(layer.weight.shape) for layer in all_linear_layers(blocks)]
    text = config.get_text_config()
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype)),
        layers=layers,
        inputs_of_block=[layer.columns for layer in linear_layers(blocks.blocks[0], "")],
        blocks=len(blocks.blocks),
        hidden=text.hidden_size,
        widest=max(max(shape) for shape in layers),
        vocabulary=text.vocab_size,
    )
