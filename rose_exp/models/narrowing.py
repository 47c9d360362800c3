"""Language models that get smaller: heads and neurons that are masked leave, and the configuration says the new widths."""

from __future__ import annotations

import copy
from collections.abc import Collection

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from ..engine import Structured
from ..runtime.errors import RoseExpError
from .blocks import BlockList
from .heads_and_neurons import find_structures

QUERIES, KEYS, NEURONS = "num_attention_heads", "num_key_value_heads", "intermediate_size"  # in configurations


def check_removable(model: nn.Module, blocks: BlockList, sparsity: Structured) -> None:
    """See that the model's configuration can say how many heads and neurons will be left.

    Raises:
        RoseExpError: it cannot, or its class refuses these numbers.
    """
    config = model.config.get_text_config()
    _narrowed(config, sparsity)
    groups = {"heads": getattr(config, KEYS, None) or getattr(config, QUERIES, None), "neurons": getattr(config, NEURONS, None)}
    for index, block in enumerate(blocks.blocks):
        found = find_structures(block, blocks.block_name(index), sparsity.kinds)
        for kind in sparsity.kinds:
            own = [structure.groups for structure in found if structure.kind == kind]
            if own != [groups[kind]]:
                raise RoseExpError(
                    f"save: expected {groups[kind]} {kind} in each block, as the configuration says, got {own} in "
                    f"{blocks.block_name(index)}: the smaller model could not be loaded"
                )


def remove_masked(
    model: nn.Module, blocks: BlockList, sparsity: Structured, pruned: Collection[str], configure: bool
) -> dict[str, int]:
    """Take the masked heads and neurons out, as many as ``sparsity`` says. No output changes.

    Args:
        pruned: names of the layers whose inputs lost heads or neurons; all others are left as they are.
        configure: let the configuration say the new widths, so that the model is saved and loaded with them; whether it can was
            seen to by :func:`check_removable`.
    Returns:
        Parameters before and after: ``dense`` and ``pruned``.
    Raises:
        ValueError: fewer are masked.
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
    """What the configuration says afterwards, by name."""
    found: dict[str, int] = {}
    if sparsity.heads:
        queries, width = getattr(config, QUERIES, None), getattr(config, "head_dim", None)
        if queries is None or not hasattr(config, "head_dim"):
            raise RoseExpError(
                f"sparsity.heads: expected a model whose configuration has {QUERIES} and head_dim, got {config.model_type}; "
                "sparsity.heads=false removes neurons alone"
            )
        keys = getattr(config, KEYS, None) or queries
        left = keys - sparsity.count(keys)
        found |= {QUERIES: queries // keys * left, KEYS: left, "head_dim": width or config.hidden_size // queries}
    if sparsity.neurons:
        neurons = getattr(config, NEURONS, None)
        if not isinstance(neurons, int):
            raise RoseExpError(f"sparsity.neurons: expected a configuration with one {NEURONS}, got {config.model_type}")
        found[NEURONS] = neurons - sparsity.count(neurons)
    try:
        values = copy.deepcopy(config).to_dict() | found
        type(config).from_dict(values)
    except (ValueError, TypeError, StrictDataclassError) as error:  # of its own checks
        told = " ".join(str(error).split())[:200]
        wanted = ", ".join(f"{name} {value}" for name, value in found.items())
        raise RoseExpError(f"sparsity.ratio: {config.model_type} takes no {wanted}: {told}") from error
    return found
