"""What a model calls its blocks with: captured from the model's own forward pass, never rebuilt."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RoseExpError
from ..models import BlockList, linear_layers


class _Enough(Exception):
    """Stops a forward pass once all that was wanted has been seen."""


@dataclass
class BlockCall:
    """How the model calls one block, but for the hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments: mask, position embeddings, cache and whatever else the family passes.
        by_keyword: whether the hidden states themselves are passed as ``hidden_states=``.
        layers: names of the block's linear layers in the order that they are called, those that are fed by the same
            tensor side by side in one list.
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    by_keyword: bool = False
    layers: list[list[str]] = field(default_factory=list)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for ``hidden`` (windows, tokens, width)."""
        args, kwargs = _to_device((self.args, self.kwargs), hidden.device)
        if self.by_keyword:
            return first_tensor(block(*args, hidden_states=hidden, **kwargs))
        return first_tensor(block(hidden, *args, **kwargs))


def first_tensor(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first in a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


@torch.no_grad()
def capture_calls(model: nn.Module, blocks: BlockList, tokens: Tensor) -> list[BlockCall]:
    """Run the model once on ``tokens`` (windows, length) and see what each block is called with.

    Raises:
        RoseExpError: the blocks are no plain chain, each fed with the output of the one before: such a model cannot be
            walked block by block.
    """
    calls = [BlockCall() for _ in blocks.blocks]
    chain = _Chain(blocks)
    with ExitStack() as stack:
        for index, block in enumerate(blocks.blocks):
            for handle in (
                block.register_forward_pre_hook(_record_call(calls[index], chain, index), with_kwargs=True),
                block.register_forward_hook(chain.leave),
            ):
                stack.callback(handle.remove)
            inputs = _LayerInputs(calls[index].layers)
            stack.callback(block.register_forward_hook(inputs.forget).remove)
            for layer in linear_layers(block, blocks.block_name(index)):
                hook = layer.module.register_forward_pre_hook(inputs.record(layer.name), with_kwargs=True)
                stack.callback(hook.remove)
        model(input_ids=tokens, use_cache=False)
    chain.check_complete()
    return calls


@torch.no_grad()
def first_inputs(model: nn.Module, blocks: BlockList, tokens: Tensor) -> Tensor:
    """Hidden states that enter the first block for ``tokens`` (windows, length): (windows, length, width)."""
    seen = []

    def stop(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    handle = blocks.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Enough:
        return seen[0]
    finally:
        handle.remove()
    raise RoseExpError(f"{blocks.block_name(0)} is never called by {type(model).__name__}; set model.blocks")


def _record_call(call: BlockCall, chain: _Chain, index: int):
    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call.by_keyword = not args
        call.args = args[1:]
        call.kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        chain.enter(index, args[0] if args else kwargs["hidden_states"])

    return hook


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

    def leave(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self.output = first_tensor(output)
        if not torch.isfinite(self.output).all():
            raise RoseExpError(f"{self.blocks.block_name(self.next - 1)}: the dense model's output is NaN or infinite")

    def check_complete(self) -> None:
        if self.next != len(self.blocks.blocks):
            raise RoseExpError(f"{self.blocks.block_name(self.next)} is never called; set model.blocks")


class _LayerInputs:
    """Sorts the linear layers of a block by the tensor that they are fed with."""

    def __init__(self, groups: list[list[str]]):
        self.groups = groups
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

    def forget(self, *_: Any) -> None:
        self.seen.clear()


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_to_device(item, device) for item in value)
    if type(value) is dict:
        return {name: _to_device(item, device) for name, item in value.items()}
    return value
