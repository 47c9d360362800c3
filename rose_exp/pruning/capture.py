"""Capturing the arguments of a model's blocks from the model's own forward pass, instead of rebuilding them.

Neither of the two passes needs a full forward pass over the calibration windows. :func:`probe` runs the whole model on a few
tokens and finds how its blocks depend on each other. :func:`trace` skips the blocks, runs everything else on real windows, and
records the arguments of each block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models import BlockList, check_layouts, linear_layers, shared_layers, unstacked_experts
from ..runtime.errors import RoseExpError
from ..runtime.outside import reason
from .calls import BlockCall, equal, first_tensor, on_device, shifted, to_device
from .failures import fails_itself, run_model
from .permutation import Channels, find_channels
from .targets import adding_layers
from .weights import BlockWeights, InMemory

PROBE_TOKENS = 8
ROUNDING = 16  # tolerance for equal results, in multiples of the dtype's epsilon, relative to the largest value


class StopForward(Exception):
    """Stops a forward pass once all required values are recorded."""


class NotAChain(RoseExpError):
    """The blocks of a model do not run one after another on the output of the previous one."""


@dataclass
class Probe:
    """Structure of a model's blocks, found by a forward pass on a few tokens.

    Attributes:
        called: indices of the blocks that text runs through; others, such as cross-attention to images, are skipped.
        axis: dimension of the windows in the hidden states, see :class:`BlockCall`.
        passes: for each called block, the values that it passes on to the next one, see :class:`BlockCall`.
        layers: for each block, the names of its linear layers in call order, grouped by shared input tensor.
        tails: for each block, its return values after the hidden states; None if it returns the hidden states alone.
        adding: for each block, the names of the layers whose output is added to the hidden states; empty unless requested.
        channels: for each block, the layers whose input channels can be reordered; empty unless requested.
        repeated: names of linear layers that their block calls more than once; each is alone in its group.
        carries: whether blocks pass values on beside the hidden states: by returning them, or by writing to containers that
            later blocks read, such as shared key-value states.
    """

    called: list[int] = field(default_factory=list)
    axis: int = 0
    passes: list[dict[int | str, int]] = field(default_factory=list)
    layers: list[list[list[str]]] = field(default_factory=list)
    tails: list[tuple | None] = field(default_factory=list)
    adding: list[list[str]] = field(default_factory=list)
    channels: list[list[Channels]] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    carries: bool = False


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
        weights: where the blocks' weights are stored; None for in memory.
        adding: whether to find the layers whose output is added to the hidden states.
        channels: whether to find the layers whose input channels can be reordered.

    Raises:
        NotAChain: the blocks are not a plain chain in which each block depends on earlier blocks only through the previous
            block's return values and containers that they share.
        RoseExpError: the model is not a causal decoder; the layers of its experts do not compute what its experts compute; or
            the model's output is not finite.
    """
    shared = shared_layers(model, blocks)
    chain, weights, count = _Chain(blocks), weights or InMemory(blocks), len(blocks.blocks)
    probed = Probe(
        layers=[[] for _ in range(count)],
        tails=[None] * count,
        adding=[[] for _ in range(count)],
        channels=[[] for _ in range(count)],
    )

    def run(index: int, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden, call = BlockCall.split(args, kwargs)
        received = chain.enter(index, hidden, call)
        if probed.called:
            probed.passes.append(received)
            probed.carries |= bool(received)
        probed.called.append(index)
        inputs, name = LayerInputs(), blocks.block_name(index)
        with weights.at(index, device), ExitStack() as stack:
            trial = on_device([call.isolated()], device)[0]
            check_layouts(block, name, lambda: trial.output(forward, hidden.to(device)))
            stack.enter_context(unstacked_experts(block))
            hooks = stack.enter_context(ExitStack())
            layers = [layer for layer in linear_layers(block, name) if layer.name not in shared]
            for layer in layers:
                hook = layer.module.register_forward_pre_hook(inputs.record(layer.name), with_kwargs=True)
                hooks.callback(hook.remove)
            call_on_device = on_device([call], device)[0]
            before = call_on_device.contents()
            output = call_on_device.output(forward, hidden.to(device))
            hooks.close()
            writes = call_on_device.contents() != before
            probed.carries |= writes
            states, isolated = hidden.to(device), call_on_device.isolated()
            single = [layer for layer in layers if layer.name not in inputs.repeated]
            names = adding_layers(lambda states: isolated.run(forward, states), single, states) if adding else []
            reorderable: list[Channels] = []
            if channels and not writes:  # otherwise a later block may read the channels in their original order
                reorderable = find_channels(lambda states: isolated.run(forward, states), block, name, states)
            output = to_device(output, hidden.device, {})
        inputs.separate_repeated()
        probed.repeated += sorted(inputs.repeated)
        add_unreached_experts(inputs.groups, [layer.name for layer in layers])
        probed.layers[index] = inputs.groups
        probed.adding[index] = names
        probed.channels[index] = reorderable
        probed.tails[index] = tuple(output[1:]) if isinstance(output, (tuple, list)) else None
        chain.leave(index, output)
        return output

    few = causality_tokens(tokens).to(home_of(model))
    with intercept_blocks(blocks, run):
        logits = _logits(run_model(model, few))
    if not probed.called:
        raise RoseExpError(f"{blocks.block_name(0)} is never called; set model.blocks")
    probed.axis = chain.axis(few)
    check_causal(model, logits)
    _check_independent(model, blocks, few, probed)
    return probed


def home_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, the embeddings, where the model expects its tokens."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def causality_tokens(tokens: Tensor) -> Tensor:
    """Return the first few of ``tokens`` (windows, length) twice, (2, few), with a different last token in the second row."""
    few = tokens[:1, :PROBE_TOKENS].repeat(2, 1)
    others = tokens[tokens != few[0, -1]]
    few[1, -1] = others[0] if len(others) else (0 if few[0, -1] else 1)
    return few


def check_causal(model: nn.Module, logits: Tensor) -> None:
    """Check that no prediction depends on a later token, from logits (2, tokens, vocabulary) for :func:`causality_tokens`.

    Raises:
        RoseExpError: a prediction depends on a later token, which makes perplexity meaningless.
    """
    first, second = logits[0, :-1].float(), logits[1, :-1].float()
    limit = ROUNDING * torch.finfo(logits.dtype).eps * float(first.abs().max())
    if float((first - second).abs().max()) > limit:
        raise RoseExpError(
            f"model: expected a causal decoder, got {type(model).__name__}, whose predictions depend on later tokens: "
            "its perplexity is not defined"
        )


@torch.no_grad()
def check_decoder(model: nn.Module, tokens: Tensor) -> None:
    """Check that a model is a causal decoder, by running it on the first few of ``tokens`` (windows, length).

    Raises:
        RoseExpError: a prediction depends on a later token, or the model fails.
    """
    check_causal(model, _logits(run_model(model, causality_tokens(tokens).to(home_of(model)))))


@torch.no_grad()
def _check_independent(model: nn.Module, blocks: BlockList, tokens: Tensor, probed: Probe) -> None:
    """Check that blocks depend on earlier blocks only through hidden states and containers that blocks write to.

    Runs everything except the blocks twice, with different block outputs the second time. Arguments that change come from
    earlier blocks, so they cannot be captured before those blocks have run.

    Raises:
        NotAChain: an argument or the model's output depends on the output of an earlier block in another way.
    """
    last = torch.zeros(())

    def run_shifted(shift: float) -> tuple[list[BlockCall], Tensor]:
        calls: list[BlockCall] = []

        def run(index: int, _block: nn.Module, _forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            nonlocal last
            hidden, call = BlockCall.split(args, kwargs)
            calls.append(call.isolated())
            tail = probed.tails[index]
            if index == probed.called[-1]:
                last = hidden if not shift else last
                return last if tail is None else (last, *tail)
            states = hidden + shift * torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
            return states if tail is None else (states, *shifted(tail, shift))

        try:
            with intercept_blocks(blocks, run):
                return calls, _logits(model(input_ids=tokens, use_cache=False))
        except Exception as error:
            if not fails_itself(model, error):
                raise
            raise NotAChain(f"{blocks.name}: the model fails if its blocks return their inputs: {reason(error)}") from error

    (calls, logits), (others, other_logits) = run_shifted(0.0), run_shifted(1.0)
    for index, call, other, passed in zip(probed.called, calls, others, [{}, *probed.passes], strict=True):
        if not equal(call.without(passed), other.without(passed)):
            names = [n for n, value in call.kwargs.items() if n not in passed and not equal(value, other.kwargs.get(n))]
            changed = ", ".join(names) or "a positional argument"
            raise NotAChain(
                f"{blocks.block_name(index)}: expected arguments that depend on the tokens alone, got {changed}, which "
                f"depends on the output of an earlier block"
            )
    if not torch.equal(logits, other_logits):
        raise NotAChain(
            f"{blocks.name}: expected a model that reads only the output of its last block, got {type(model).__name__}, which "
            "also reads outputs of earlier blocks"
        )


@torch.no_grad()
def trace(
    model: nn.Module, blocks: BlockList, tokens: Tensor, probed: Probe, whole: bool = True
) -> tuple[Tensor, list[BlockCall]]:
    """Return the inputs of the first block, (windows, …, width), and the arguments of every called block.

    No block runs: each returns its input.

    Args:
        tokens: (windows, length) int64.
        whole: whether to record all blocks; if false, only the first one.

    Raises:
        RoseExpError: a block is never called, or the hidden states have an unexpected shape.
    """
    hidden_states: list[Tensor] = []
    calls: list[BlockCall] = []
    last = probed.called[-1 if whole else 0]

    def run(index: int, _block: nn.Module, _forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden, call = BlockCall.split(args, kwargs)
        hidden_states.append(hidden)
        calls.append(replace(call, axis=probed.axis))
        if index == last:
            raise StopForward
        return hidden if probed.tails[index] is None else (hidden, *probed.tails[index])

    with intercept_blocks(blocks, run):
        try:
            model(input_ids=tokens.to(home_of(model)), use_cache=False)
        except StopForward:
            states = hidden_states[0].movedim(probed.axis, 0)
            if states.shape[0] != len(tokens) or tokens.shape[1] not in states.shape[1:-1]:
                raise RoseExpError(
                    f"{blocks.block_name(0)}: expected hidden states of shape (windows, tokens, width) = "
                    f"{(*tokens.shape, 'width')}, got {tuple(hidden_states[0].shape)}"
                ) from None
            return states, calls
    raise RoseExpError(f"{blocks.block_name(probed.called[len(calls)])} is not called for every window; set model.blocks")


@contextmanager
def intercept_blocks(blocks: BlockList, run: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward pass of every block by ``run(index, block, forward, args, kwargs)``."""

    def wrap(index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward
        return lambda *args, **kwargs: run(index, block, forward, args, kwargs)

    try:
        for index, block in enumerate(blocks.blocks):
            block.forward = wrap(index, block)
        yield
    finally:
        for block in blocks.blocks:
            block.__dict__.pop("forward", None)


class _Chain:
    """Checks that every block is called at most once, in order, with the output of the previous called block.

    Blocks that are never called, such as the cross-attention of Llama 3.2 to images, do not count.
    """

    def __init__(self, blocks: BlockList):
        self.blocks = blocks
        self.last = -1
        self.output: Any = None

    def enter(self, index: int, hidden: Tensor, call: BlockCall) -> dict[int | str, int]:
        """Return the arguments of a call that the previous block returned, see :attr:`BlockCall.passes`."""
        if index <= self.last or (self.output is not None and not torch.equal(hidden, first_tensor(self.output))):
            raise NotAChain(
                f"{self.blocks.block_name(index)}: expected the output of the previous block as input, got another tensor: "
                f"{self.blocks.name} is not a plain chain of blocks"
            )
        self.last = index
        return call.places_of(self.output) if isinstance(self.output, (tuple, list)) else {}

    def leave(self, index: int, output: Any) -> None:
        self.output = output
        if not torch.isfinite(first_tensor(output)).all():
            raise RoseExpError(f"{self.blocks.block_name(index)}: expected finite dense outputs, got NaN or infinity")

    def axis(self, tokens: Tensor) -> int:
        """Return the dimension of the windows in the hidden states, the one before that of the tokens."""
        shape = first_tensor(self.output).shape
        axes = [axis for axis in range(len(shape) - 2) if shape[axis : axis + 2] == tokens.shape]
        if not axes:
            raise NotAChain(
                f"{self.blocks.name}: expected hidden states with windows and tokens in two successive dimensions, "
                f"{tuple(tokens.shape)}, got the shape {tuple(shape)}"
            )
        return axes[0]


def add_unreached_experts(groups: list[list[str]], names: Sequence[str]) -> None:
    """Add experts that received none of the few tokens, next to an expert that received some and with its grouping."""
    called = {name for group in groups for name in group}
    for name in names:
        expert = re.match(r"(.*\.experts\.)(\d+)(\..*)", name)
        if name in called or expert is None:
            continue
        for place, group in enumerate(groups):
            reached = re.match(rf"{re.escape(expert[1])}(\d+){re.escape(expert[3])}$", group[0])
            if reached is not None:
                prefix, expert_prefix = f"{expert[1]}{reached[1]}.", f"{expert[1]}{expert[2]}."
                added = [expert_prefix + other.removeprefix(prefix) for other in group if other.startswith(prefix)]
                groups.insert(place + 1, added)
                called |= set(added)
                break


class LayerInputs:
    """Groups the linear layers of a block by their input tensor."""

    def __init__(self):
        self.groups: list[list[str]] = []
        self.seen: list[Tensor] = []  # kept alive, so that no two tensors have the same address
        self.repeated: set[str] = set()

    def separate_repeated(self) -> None:
        """Put each layer that was called more than once into a group of its own."""
        groups: list[list[str]] = []
        for group in self.groups:
            groups += [[name for name in group if name not in self.repeated]]
            groups += [[name] for name in group if name in self.repeated]
        self.groups = [group for group in groups if group]

    def record(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else kwargs["input"]
            if any(name in group for group in self.groups):
                self.repeated.add(name)
                return
            for group, other in zip(self.groups, self.seen, strict=True):
                if other is tensor:
                    group.append(name)
                    return
            self.groups.append([name])
            self.seen.append(tensor)

        return hook
