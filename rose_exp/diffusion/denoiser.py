"""Finding what can be pruned in a denoiser, and in which order, by structure: no architecture has code of its own."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models import LinearLayer
from ..runtime.errors import RoseExpError


class ConvLayer(LinearLayer):
    """A two-dimensional convolution as the linear layer that it is of the patches that it sees."""

    @property
    def weight(self) -> Tensor:
        """W, (rows, columns) = (channels out, channels in · height · width of the kernel), a view."""
        return self.module.weight.detach().flatten(1)

    def set_weight(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.module.weight.copy_(weight.view_as(self.module.weight))


def tokens_of(layer: LinearLayer, inputs: Tensor) -> Tensor:
    """What W of the layer multiplies, (..., columns)."""
    if not isinstance(layer, ConvLayer):
        return inputs
    conv = layer.module
    padded = functional.pad(
        inputs, conv._reversed_padding_repeated_twice, "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    )
    return functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride).transpose(1, 2)


@dataclass(frozen=True)
class Unit:
    """Layers whose inputs hang on none of each other's outputs, the paper's basic unit.

    Attributes:
        groups: names of the layers, those with the same input together, in the order of their calls.
    """

    groups: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]


@dataclass(frozen=True)
class DenoiserCall:
    """How the pipeline calls its denoiser."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def candidate_layers(denoiser: nn.Module, convolutions: bool) -> list[LinearLayer]:
    """Linear layers of attention and of all that stands beside it in a transformer block; with ``convolutions`` those of the
    blocks as well, but not what leads into the denoiser and out of it."""
    found: dict[str, LinearLayer] = {}
    for root in _blocks(denoiser):
        for name, module in denoiser.get_submodule(root).named_modules():
            if isinstance(module, nn.Linear):
                found[f"{root}.{name}"] = LinearLayer(f"{root}.{name}", module)
    if convolutions:
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1 and re.search(r"\.\d+\.", name):
                found[name] = ConvLayer(name, module)
    return list(found.values())


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    """Names of the modules that hold attention, outermost first, each once."""
    found: list[str] = []
    for name, module in denoiser.named_modules():
        if not hasattr(module, "to_q"):
            continue
        above = name.rpartition(".")[0]
        root = name if isinstance(denoiser.get_submodule(above), nn.ModuleList) else above
        if not any(root == other or root.startswith(f"{other}.") for other in found):
            found.append(root)
    return iter(found)


def find_units(denoiser: nn.Module, call: DenoiserCall, layers: Sequence[LinearLayer]) -> list[Unit]:
    """Sort layers into units, from the one that hangs on no other layer's output to the last.

    The denoiser is run once, as ``call`` says, with the graph of what is made from what; nothing is kept of the activations.
    Layers that see no tokens, but a vector an image, such as those that scale by the time step, are in no unit, nor are those
    that are not called.

    Raises:
        RoseExpError: no layer sees tokens.
    """
    probe = _Probe()
    with ExitStack() as stack:
        for layer in layers:
            probe.watch(layer, stack)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda _tensor: None, lambda kept: kept))
        denoiser(*call.args, **call.kwargs)
    levels: dict[str, int] = {}
    by_level: dict[int, dict[int, list[str]]] = {}
    for fed in probe.found.values():
        levels[fed.name] = level = 1 + max((levels[name] for name in fed.hangs_on), default=-1)
        if fed.tokens:
            by_level.setdefault(level, {}).setdefault(fed.group, []).append(fed.name)
    if not by_level:
        raise RoseExpError(f"{type(denoiser).__name__} has no layer of attention or feed-forward that sees tokens")
    return [Unit(tuple(tuple(names) for names in by_level[level].values())) for level in sorted(by_level)]


def packages(units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """The units in ``count`` runs of equal length, give or take one, or as many as there are units if these are fewer."""
    count = min(count, len(units))
    bounds = [len(units) * i // count for i in range(count + 1)]
    return [list(units[start:end]) for start, end in pairwise(bounds)]


@dataclass(frozen=True)
class _Fed:
    """A layer's call. ``group`` is the same for layers that were given the same tensor."""

    name: str
    group: int
    tokens: bool
    hangs_on: frozenset[str]


class _Probe:
    """Hooks that note what each layer is fed with, and cut the graph behind each, so that the graph of an input shows those
    layers that it hangs on with no other in between."""

    def __init__(self):
        self.found: dict[str, _Fed] = {}
        self.inputs: list[weakref.ref] = []  # of each group; a tensor's address alone is soon another's

    def watch(self, layer: LinearLayer, stack: ExitStack) -> None:
        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            if layer.name in self.found:
                raise RoseExpError(f"{layer.name} is called twice in one step, and cannot be pruned; name it in pipeline.skip")
            group = next((i for i, kept in enumerate(self.inputs) if kept() is inputs), len(self.inputs))
            if group == len(self.inputs):
                self.inputs.append(weakref.ref(inputs))
            tokens = isinstance(layer, ConvLayer) or inputs.ndim > 2
            self.found[layer.name] = _Fed(layer.name, group, tokens, frozenset(_makers(inputs)))

        def after(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            leaf.made_by = layer.name
            return leaf * 1  # no leaf itself: it may be changed in place

        for hook in (layer.module.register_forward_pre_hook(before), layer.module.register_forward_hook(after)):
            stack.callback(hook.remove)


def _makers(tensor: Tensor) -> set[str]:
    """Names of the watched layers whose outputs a tensor is made of."""
    found: set[str] = set()
    known, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        name = getattr(getattr(node, "variable", None), "made_by", None)
        if name is not None:
            found.add(name)
        waiting += [before for before, _ in node.next_functions]
    return found
