"""Find the prunable layers of a denoiser and their pruning order from its structure, without code for any architecture."""

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
    """A two-dimensional convolution, treated as a linear layer applied to patches of its input."""

    @property
    def weight(self) -> Tensor:
        """W as a view, (rows, columns) = (output channels, input channels · kernel height · kernel width)."""
        return self.module.weight.detach().flatten(1)

    def set_weight(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.module.weight.copy_(weight.view_as(self.module.weight))


def tokens_of(layer: LinearLayer, inputs: Tensor) -> Tensor:
    """Return the vectors that the weight of ``layer`` multiplies, (..., columns): patches for a convolution."""
    if not isinstance(layer, ConvLayer):
        return inputs
    conv = layer.module
    padded = functional.pad(
        inputs, conv._reversed_padding_repeated_twice, "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    )
    return functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride).transpose(1, 2)


@dataclass(frozen=True)
class Unit:
    """Layers with mutually independent inputs, the paper's basic unit.

    Attributes:
        groups: names of the layers in call order; layers with the same input form one group.
    """

    groups: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]


@dataclass(frozen=True)
class DenoiserCall:
    """Arguments of one call of the denoiser by its pipeline."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def candidate_layers(denoiser: nn.Module, convolutions: bool) -> list[LinearLayer]:
    """Return the linear layers of all transformer blocks, and with ``convolutions`` also the convolutions of all blocks.

    Input and output layers of the denoiser are left out.
    """
    layers: dict[str, LinearLayer] = {}
    for root in _blocks(denoiser):
        for name, module in denoiser.get_submodule(root).named_modules():
            if isinstance(module, nn.Linear):
                layers[f"{root}.{name}"] = LinearLayer(f"{root}.{name}", module)
    if convolutions:
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1 and re.search(r"\.\d+\.", name):
                layers[name] = ConvLayer(name, module)
    return list(layers.values())


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    """Yield the names of the outermost modules that contain attention."""
    roots: list[str] = []
    for name, module in denoiser.named_modules():
        if not hasattr(module, "to_q"):
            continue
        above = name.rpartition(".")[0]
        root = name if isinstance(denoiser.get_submodule(above), nn.ModuleList) else above
        if not any(root == other or root.startswith(f"{other}.") for other in roots):
            roots.append(root)
    return iter(roots)


def find_units(denoiser: nn.Module, call: DenoiserCall, layers: Sequence[LinearLayer]) -> list[Unit]:
    """Group layers into units, sorted by dependency: each unit depends only on the outputs of earlier units.

    The denoiser runs once with the arguments of ``call``. The autograd graph gives the dependencies; no activations are saved.
    Units leave out layers that are not called, and layers whose input is one vector per image instead of tokens, such as the
    modulation by the time step.

    Raises:
        RoseExpError: no layer has tokens as input.
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
    for layer_call in probe.calls.values():
        levels[layer_call.name] = level = 1 + max((levels[name] for name in layer_call.depends_on), default=-1)
        if layer_call.tokens:
            by_level.setdefault(level, {}).setdefault(layer_call.group, []).append(layer_call.name)
    if not by_level:
        raise RoseExpError(f"{type(denoiser).__name__} has no attention or feed-forward layer with tokens as input")
    return [Unit(tuple(tuple(names) for names in by_level[level].values())) for level in sorted(by_level)]


def split_into_packages(units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """Split the units into ``count`` consecutive packages whose sizes differ by at most one; fewer if there are fewer units."""
    count = min(count, len(units))
    bounds = [len(units) * i // count for i in range(count + 1)]
    return [list(units[start:end]) for start, end in pairwise(bounds)]


@dataclass(frozen=True)
class _LayerCall:
    """One call of a layer. Layers with the same input tensor share a ``group``."""

    name: str
    group: int
    tokens: bool
    depends_on: frozenset[str]


class _Probe:
    """Hooks that record the inputs of each layer.

    The output of each layer starts a new autograd graph. The graph of an input therefore contains only its direct dependencies.
    """

    def __init__(self):
        self.calls: dict[str, _LayerCall] = {}
        self.inputs: list[weakref.ref] = []  # one per group; the address of a freed tensor is reused

    def watch(self, layer: LinearLayer, stack: ExitStack) -> None:
        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            if layer.name in self.calls:
                raise RoseExpError(f"{layer.name} is called twice in one step and cannot be pruned; add it to pipeline.skip")
            group = next((i for i, kept in enumerate(self.inputs) if kept() is inputs), len(self.inputs))
            if group == len(self.inputs):
                self.inputs.append(weakref.ref(inputs))
            tokens = isinstance(layer, ConvLayer) or inputs.ndim > 2
            self.calls[layer.name] = _LayerCall(layer.name, group, tokens, frozenset(_makers(inputs)))

        def after(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            leaf.made_by = layer.name
            return leaf * 1  # not a leaf: the denoiser may modify it in place

        for hook in (layer.module.register_forward_pre_hook(before), layer.module.register_forward_hook(after)):
            stack.callback(hook.remove)


def _makers(tensor: Tensor) -> set[str]:
    """Return the names of the watched layers that a tensor directly depends on."""
    makers: set[str] = set()
    visited, pending = set(), [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        name = getattr(getattr(node, "variable", None), "made_by", None)
        if name is not None:
            makers.add(name)
        pending += [before for before, _ in node.next_functions]
    return makers
