"""Forward passes of a model whose blocks are not in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..runtime import signals as interruption
from ..runtime.batches import batch_size
from ..runtime.files import scratch_folder
from .activations import Place
from .capture import NotAChain, Probe, home_of, intercept_blocks, probe
from .enter import enter
from .weights import BlockWeights
from .whole import running_blocks


@torch.no_grad()
def answers_by_blocks(
    model: nn.Module,
    weights: BlockWeights,
    tokens: Tensor,
    device: torch.device | str,
    batch: int,
    place: Place,
    scratch: Path,
    name: str,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute a model's logits block by block, reading each block once.

    Args:
        tokens: (windows, length) int64.
        place: where the hidden states are stored, see :class:`Activations`.
        scratch: folder for hidden states on disk.
        name: name of the progress bar.
        around: context in which the logits of a batch are computed.
    Yields:
        A batch of windows and its logits (windows, length, vocabulary), equal to those of the whole model. If the blocks are
        not a chain, every batch reads all blocks.
    """
    blocks = weights.blocks
    try:
        probed = probe(model, blocks, tokens, device, weights)
    except NotAChain:
        with running_blocks(weights, device):
            for windows in tqdm(tokens.split(batch_size(batch, device)), name, unit="batch", disable=None, leave=False):
                interruption.check()
                with around():
                    logits = model(input_ids=windows.to(home_of(model)), use_cache=False).logits
                yield windows, logits
        return
    with scratch_folder(scratch) as folder:
        hidden, calls = enter(model, blocks, tokens, batch, place, probed, device, folder / "hidden")
        for index in tqdm(probed.called, f"{name}, by blocks", unit="block", disable=None, leave=False):
            interruption.check()
            with weights.at(index, device) as block:
                for windows, states in hidden:
                    hidden[windows] = calls[windows.start].pop(index).run(block, states)
        for windows, states in hidden:
            with around():
                logits = _after_blocks(model, weights, probed, tokens[windows], states)
            yield tokens[windows], logits


def _after_blocks(model: nn.Module, weights: BlockWeights, probed: Probe, tokens: Tensor, states: Tensor) -> Tensor:
    """Return the logits for the last block's output ``states``.

    Runs the model with blocks that return their inputs, except the last one, which returns ``states``.
    """
    last = probed.called[-1]
    home = home_of(model)
    states = states.movedim(0, probed.axis)

    def run(index: int, _block: nn.Module, _forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden = states.to(home) if index == last else (args[0] if args else kwargs["hidden_states"])
        return hidden if probed.tails[index] is None else (hidden, *probed.tails[index])

    with intercept_blocks(weights.blocks, run):
        return model(input_ids=tokens.to(home), use_cache=False).logits


@contextmanager
def loading_blocks(weights: BlockWeights, device: torch.device | str) -> Iterator[None]:
    """Make the model load each block when it is called."""

    def run(index: int, _block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        interruption.check()
        with weights.at(index, device):
            return forward(*args, **kwargs)

    with intercept_blocks(weights.blocks, run):
        yield
