"""Computing the inputs of the first block and the arguments of every block from tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import BlockList
from ..runtime.batches import batch_size
from .activations import Activations, Place
from .calls import BlockCall, link, on_device, share_equal
from .capture import Probe, trace

Calls = dict[int, dict[int, BlockCall]]
"""Arguments of the blocks for each batch, by the index of the batch's first window and the index of the block."""


def enter(
    model: nn.Module,
    blocks: BlockList,
    tokens: Tensor,
    batch: int,
    place: Place,
    probed: Probe,
    device: torch.device | str,
    file: Path,
) -> tuple[Activations, Calls]:
    """Return the inputs of the first block and the arguments of every block for each batch.

    Arguments may depend on the tokens, such as the per-block embeddings of Gemma 4, so every batch is traced. Values that are
    equal for several batches are stored once.

    Args:
        tokens: (windows, length) int64.
        batch: number of windows per batch on a GPU, see :func:`rose_exp.runtime.batches.batch_size`.
        place, file: storage of the hidden states, see :class:`Activations`.
    """
    size = batch_size(batch, device)
    home = device if place == "device" else "cpu"  # arguments of each batch can be as large as its hidden states
    hidden: Activations | None = None
    calls: Calls = {}
    first: dict[int, tuple[list[BlockCall], dict[int, Any]]] = {}  # by batch size: captured calls and their moved tensors
    for start in range(0, len(tokens), size):
        windows = tokens[start : start + size]
        states, called = trace(model, blocks, windows, probed)
        if len(windows) in first:
            captured, moved = first[len(windows)]
            batch_calls = on_device(share_equal(called, captured), home, dict(moved))
        else:
            moved = {}
            batch_calls = on_device(called, device, moved)
            first[len(windows)] = called, {key: value for key, value in moved.items() if isinstance(value, Tensor)}
        link(batch_calls, probed.passes)
        calls[start] = dict(zip(probed.called, batch_calls, strict=True))
        if hidden is None:
            shape = (len(tokens), *states.shape[1:])
            hidden = Activations(shape, states.dtype, place, device, size, file)
        hidden[start : start + len(windows)] = states
    return hidden, calls


def second_stream(calls: Calls) -> Calls:
    """Return copies of the calls for a second stream of hidden states, because blocks may write to containers in them."""
    copied: Calls = {}
    for start, batch_calls in calls.items():
        copies: dict[int, Any] = {}
        copied[start] = {index: call.isolated(copies) for index, call in batch_calls.items()}
        link([*copied[start].values()], [call.passes for call in batch_calls.values()])
    return copied
