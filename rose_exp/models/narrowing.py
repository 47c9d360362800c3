"""Removing masked heads and neurons from language models, and updating their configuration."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from ..engine import Structured
from ..runtime.errors import RoseExpError
from .blocks import BlockList, find_blocks
from .heads_and_neurons import find_structures

QUERIES, KEYS, NEURONS = "num_attention_heads", "num_key_value_heads", "intermediate_size"  # configuration fields


def check_removable(model: nn.Module, blocks: BlockList, sparsity: Structured) -> None:
    """Check that the model's configuration can describe the numbers of heads and neurons after pruning.

    Raises:
        RoseExpError: it cannot, or its class rejects or ignores these numbers.
    """
    config = model.config.get_text_config()
    entries = _narrowed(config, sparsity)
    groups = {"heads": _field(config, KEYS) or _field(config, QUERIES), "neurons": _field(config, NEURONS)}
    for index, block in enumerate(blocks.blocks):
        structures = find_structures(block, blocks.block_name(index), sparsity.kinds)
        for kind in sparsity.kinds:
            sizes = [structure.groups for structure in structures if structure.kind == kind]
            if sizes != [groups[kind]]:
                raise RoseExpError(
                    f"save: expected {groups[kind]} {kind} in each block according to the configuration, got {sizes} in "
                    f"{blocks.block_name(index)}: the pruned model cannot be loaded"
                )
    _check_rebuilt(model, blocks, sparsity, entries)


def _check_rebuilt(model: nn.Module, blocks: BlockList, sparsity: Structured, entries: Mapping[str, int]) -> None:
    """Check that a model built from the changed configuration has the widths of the pruned one.

    A class can read a field that its configuration does not define, as Qwen2 reads ``head_dim``, or ignore one.
    """
    config = copy.deepcopy(model.config)
    for name, value in entries.items():
        setattr(config.get_text_config(), name, value)
    with torch.device("meta"):
        rebuilt = find_blocks(type(model)._from_config(config), blocks.name)
    for index, (block, new) in enumerate(zip(blocks.blocks, rebuilt.blocks, strict=True)):
        name = blocks.block_name(index)
        pairs = zip(find_structures(block, name, sparsity.kinds), find_structures(new, name, sparsity.kinds), strict=True)
        for structure, narrow in pairs:
            expected = structure.groups - sparsity.count(structure.groups)
            widths = [part.places.shape[1] for part in structure.consumers]
            if narrow.groups != expected or [part.places.shape[1] for part in narrow.consumers] != widths:
                changes = ", ".join(f"{name} {value}" for name, value in entries.items())
                raise RoseExpError(
                    f"save: expected a model class that builds {expected} {structure.kind} in {name} from {changes}, got "
                    f"{type(model).__name__}, which builds {narrow.groups}: the pruned model cannot be loaded"
                )


def remove_masked(
    model: nn.Module, blocks: BlockList, sparsity: Structured, pruned: Collection[str], configure: bool
) -> dict[str, int]:
    """Remove as many masked heads and neurons as ``sparsity`` requests, without changing any output.

    Args:
        pruned: names of the layers whose inputs lost heads or neurons; other layers do not change.
        configure: whether to update the configuration, so that the model can be saved and loaded; requires a previous
            :func:`check_removable`.
    Returns:
        Number of parameters before and after: ``dense`` and ``pruned``.
    Raises:
        ValueError: fewer heads or neurons are masked.
    """
    before = sum(parameter.numel() for parameter in model.parameters())
    for index, block in enumerate(blocks.blocks):
        for structure in find_structures(block, blocks.block_name(index), sparsity.kinds):
            if any(part.layer.name in pruned for part in structure.consumers):
                structure.remove_masked(sparsity.count(structure.groups))
    if configure:
        config = model.config.get_text_config()
        for name, value in _narrowed(config, sparsity).items():
            setattr(config, name, value)
    return {"dense": before, "pruned": sum(parameter.numel() for parameter in model.parameters())}


def _narrowed(config: PreTrainedConfig, sparsity: Structured) -> dict[str, int]:
    """Return the changed configuration fields by name."""
    entries: dict[str, int] = {}
    if sparsity.heads:
        queries, width = _field(config, QUERIES), _field(config, "head_dim")
        if queries is None:
            raise RoseExpError(
                f"sparsity.heads: expected a model whose configuration has {QUERIES}, got {config.model_type}; "
                "set sparsity.heads=false to remove only neurons"
            )
        keys = _field(config, KEYS) or queries
        remaining = keys - sparsity.count(keys)
        entries |= {QUERIES: queries // keys * remaining, KEYS: remaining, "head_dim": width or config.hidden_size // queries}
    if sparsity.neurons:
        neurons = _field(config, NEURONS)
        if not isinstance(neurons, int):
            raise RoseExpError(f"sparsity.neurons: expected a configuration with one {NEURONS}, got {config.model_type}")
        entries[NEURONS] = neurons - sparsity.count(neurons)
    try:
        changed = copy.deepcopy(config)
        for name, value in entries.items():
            setattr(changed, name, value)
        type(config).from_dict(changed.to_dict())
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:  # from checks of the configuration class
        reason = " ".join(str(error).split())[:200]
        changes = ", ".join(f"{name} {value}" for name, value in entries.items())
        raise RoseExpError(f"sparsity.ratio: {config.model_type} does not support {changes}: {reason}") from error
    return entries


def _field(config: PreTrainedConfig, name: str) -> Any:
    """Return a field of a configuration, or None if there is no such field.

    Raises:
        RoseExpError: the field has different values for different blocks.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError as error:  # transformers' error for a field that differs between blocks
        raise RoseExpError(
            f"sparsity: expected a configuration with one {name} for all blocks, got {config.model_type}"
        ) from error
