"""From tokens to the hidden states that enter the first block, and to the arguments of every block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import BlockList
from ..runtime.batches import at_once
from .activations import Activations, Place
from .capture import BlockCall, Probe, on_device, share_equal, trace

Calls = dict[int, list[BlockCall]]  # how every block is called with a batch, by the number of the batch's first window


def enter(
    model: nn.Module,
    blocks: BlockList,
    tokens: Tensor,
    batch: int,
    place: Place,
    found: Probe,
    device: torch.device | str,
    file: Path,
) -> tuple[Activations, Calls]:
    """The hidden states that enter the first block, and how every block is called with each batch.

    Arguments may depend on the tokens, such as Gemma 4's embeddings for each block, so every batch is traced; what is equal
    for several batches is held once.

    Args:
        tokens: (windows, length) int64.
        batch: windows at once, on a GPU; see :func:`rose_exp.runtime.batches.at_once`.
        place, file: of the hidden states, see :class:`Activations`.
    """
    size = at_once(batch, device)
    held = device if place == "device" else "cpu"  # arguments that differ from batch to batch may take as much as hidden states
    hidden: Activations | None = None
    calls: Calls = {}
    first: dict[int, tuple[list[BlockCall], dict[int, Any]]] = {}  # by size: calls as captured, and what is moved of them
    for start in range(0, len(tokens), size):
        windows = tokens[start : start + size]
        states, called = trace(model, blocks, windows, found)
        if len(windows) in first:
            captured, moved = first[len(windows)]
            calls[start] = on_device(share_equal(called, captured), held, dict(moved))
        else:
            moved = {}
            calls[start] = on_device(called, device, moved)
            first[len(windows)] = called, {key: value for key, value in moved.items() if isinstance(value, Tensor)}
        if hidden is None:
            shape = (len(tokens), *states.shape[1:])
            hidden = Activations(shape, states.dtype, place, device, size, file)
        hidden[start : start + len(windows)] = states
    return hidden, calls


def second_stream(calls: Calls) -> Calls:
    """The same calls for a second stream of hidden states: containers that blocks write to belong to one stream."""
    found: Calls = {}
    for start, of_batch in calls.items():
        copies: dict[int, Any] = {}
        found[start] = [call.isolated(copies) for call in of_batch]
    return found
