"""What a model calls its blocks with: captured from the model's own forward pass, never rebuilt.

Two passes, neither of which costs a forward pass over the calibration windows: :func:`probe` runs the whole model on a few
tokens and sees how its blocks hang together; :func:`trace` runs all but the blocks on real windows and sees what each block
would be called with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RoseExpError
from ..models import BlockList, linear_layers, one_by_one
from .channels import Channels, find_channels
from .residual import adding_layers
from .weights import BlockWeights, InMemory

PROBE_TOKENS = 8


class Enough(Exception):
    """Stops a forward pass once all that was wanted has been seen."""


@dataclass
class BlockCall:
    """How the model calls one block, but for the hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments: mask, position embeddings, cache and whatever else the family passes.
        by_keyword: whether the hidden states themselves are passed as ``hidden_states=``.
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    by_keyword: bool = False

    @classmethod
    def split(cls, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
        """The hidden states of a call, and the rest of it."""
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return (args[0] if args else kwargs["hidden_states"]), cls(args[1:], rest, by_keyword=not args)

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states for ``hidden`` (windows, tokens, width)."""
        return first_tensor(self.output(block, hidden))

    def output(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """All that the block answers."""
        if self.by_keyword:
            return block(*self.args, hidden_states=hidden, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)


def on_device(calls: list[BlockCall], device: torch.device | str) -> list[BlockCall]:
    """The same calls with every tensor on ``device``; one that several blocks share is moved once."""
    moved: dict[int, Tensor] = {}
    return [BlockCall(*_to_device((call.args, call.kwargs), device, moved), call.by_keyword) for call in calls]


def first_tensor(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first in a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


@dataclass
class Probe:
    """What a run on a few tokens has shown.

    Attributes:
        layers: of each block, the names of its linear layers in the order that they are called, those that are fed by the
            same tensor side by side in one list.
        tails: of each block, what it returns after the hidden states; None: it returns them alone.
        adding: of each block, the names of the layers whose output is added to the hidden states; empty if not looked for.
        channels: of each block, the layers whose inputs can be put in another order; empty if not looked for.
    """

    layers: list[list[list[str]]] = field(default_factory=list)
    tails: list[tuple | None] = field(default_factory=list)
    adding: list[list[str]] = field(default_factory=list)
    channels: list[list[Channels]] = field(default_factory=list)


@torch.no_grad()
def probe(
    model: nn.Module,
    blocks: BlockList,
    tokens: Tensor,
    device: torch.device | str = "cpu",
    weights: BlockWeights | None = None,
    adding: bool = False,
    channels: bool = False,
) -> Probe:
    """Run the model on the first few of ``tokens`` (windows, length), each block on ``device``.

    Args:
        weights: where the blocks' weights are; None: in memory.
        adding: look also for the layers whose output is added to the hidden states.
        channels: look also for the layers whose inputs can be put in another order.

    Raises:
        RoseExpError: the blocks are no plain chain, each fed with the output of the one before: such a model cannot be
            walked block by block; or the model's output is not finite.
    """
    chain, found, weights = _Chain(blocks), Probe(), weights or InMemory(blocks)

    def run(index: int, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden, call = BlockCall.split(args, kwargs)
        chain.enter(index, hidden)
        inputs = _LayerInputs()
        with weights.at(index, device), one_by_one(block), ExitStack() as stack:
            layers = linear_layers(block, blocks.block_name(index))
            for layer in layers:
                hook = layer.module.register_forward_pre_hook(inputs.record(layer.name), with_kwargs=True)
                stack.callback(hook.remove)
            there = on_device([call], device)[0]
            output = there.output(forward, hidden.to(device))
            stack.pop_all().close()
            states = hidden.to(device)
            names = adding_layers(lambda states: there.run(forward, states), layers, states) if adding else []
            name = blocks.block_name(index)
            free = find_channels(lambda states: there.run(forward, states), block, name, states) if channels else []
            output = _to_device(output, hidden.device, {})
        _add_unreached_experts(inputs.groups, [layer.name for layer in layers])
        found.layers.append(inputs.groups)
        found.adding.append(names)
        found.channels.append(free)
        found.tails.append(tuple(output[1:]) if isinstance(output, (tuple, list)) else None)
        chain.leave(index, first_tensor(output))
        return output

    with in_place_of_blocks(blocks, run):
        model(input_ids=tokens[:1, :PROBE_TOKENS], use_cache=False)
    chain.check_complete()
    return found


@torch.no_grad()
def trace(
    model: nn.Module, blocks: BlockList, tokens: Tensor, found: Probe, whole: bool = True
) -> tuple[Tensor, list[BlockCall]]:
    """Hidden states that enter the first block for ``tokens`` (windows, length), (windows, length, width), and how each
    block is called; not ``whole``: only the first one's call. No block is run: each answers with what it was given."""
    seen: list[Tensor] = []
    calls: list[BlockCall] = []

    def run(index: int, _block: nn.Module, _forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden, call = BlockCall.split(args, kwargs)
        seen.append(hidden)
        calls.append(call)
        if index == len(blocks.blocks) - 1 or not whole:
            raise Enough
        return hidden if found.tails[index] is None else (hidden, *found.tails[index])

    with in_place_of_blocks(blocks, run):
        try:
            model(input_ids=tokens, use_cache=False)
        except Enough:
            return seen[0], calls
    raise RoseExpError(f"{blocks.block_name(len(calls))} is never called; set model.blocks")


@contextmanager
def in_place_of_blocks(blocks: BlockList, run: Callable[..., Any]) -> Iterator[None]:
    """Let ``run(index, block, forward, args, kwargs)`` answer for every block."""

    def answer(index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward
        return lambda *args, **kwargs: run(index, block, forward, args, kwargs)

    try:
        for index, block in enumerate(blocks.blocks):
            block.forward = answer(index, block)
        yield
    finally:
        for block in blocks.blocks:
            block.__dict__.pop("forward", None)


class _Chain:
    """Checks that every block is called once, in order, with what the block before it returned."""

    def __init__(self, blocks: BlockList):
        self.blocks = blocks
        self.next = 0
        self.output: Tensor | None = None

    def enter(self, index: int, hidden: Tensor) -> None:
        if index != self.next or (self.output is not None and not torch.equal(hidden, self.output)):
            raise RoseExpError(
                f"{self.blocks.block_name(index)} is not fed with the output of the block before it: "
                f"{self.blocks.name} is no plain chain of blocks and cannot be pruned block by block"
            )
        self.next += 1

    def leave(self, index: int, output: Tensor) -> None:
        self.output = output
        if not torch.isfinite(output).all():
            raise RoseExpError(f"{self.blocks.block_name(index)}: the dense model's output is NaN or infinite")

    def check_complete(self) -> None:
        if self.next != len(self.blocks.blocks):
            raise RoseExpError(f"{self.blocks.block_name(self.next)} is never called; set model.blocks")


def _add_unreached_experts(groups: list[list[str]], names: Sequence[str]) -> None:
    """Experts in a list of modules that none of the few tokens was routed to share their inputs in the way of one that was."""
    called = {name for group in groups for name in group}
    for name in names:
        expert = re.match(r"(.*\.experts\.)(\d+)(\..*)", name)
        if name in called or expert is None:
            continue
        for group in list(groups):
            reached = re.match(rf"{re.escape(expert[1])}(\d+){re.escape(expert[3])}$", group[0])
            if reached is not None:
                prefix, own = f"{expert[1]}{reached[1]}.", f"{expert[1]}{expert[2]}."
                groups.append([own + other.removeprefix(prefix) for other in group if other.startswith(prefix)])
                called |= set(groups[-1])
                break


class _LayerInputs:
    """Sorts the linear layers of a block by the tensor that they are fed with."""

    def __init__(self):
        self.groups: list[list[str]] = []
        self.seen: list[Tensor] = []  # kept until the block is done, so that no two tensors share a place in memory

    def record(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else kwargs["input"]
            if any(name in group for group in self.groups):
                raise RoseExpError(f"{name} is called more than once in its block, which is not supported")
            for group, other in zip(self.groups, self.seen, strict=True):
                if other is tensor:
                    group.append(name)
                    return
            self.groups.append([name])
            self.seen.append(tensor)

        return hook


def _to_device(value: Any, device: torch.device | str, moved: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if type(value) in (tuple, list):
        return type(value)(_to_device(item, device, moved) for item in value)
    if type(value) is dict:
        return {name: _to_device(item, device, moved) for name, item in value.items()}
    return value
