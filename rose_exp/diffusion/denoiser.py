"""Find the prunable layers of a denoiser and their pruning order from its structure, without code for any architecture."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models import LinearLayer
from ..pruning.plan import SUBSTANTIAL
from ..runtime.errors import RoseExpError

LATENTS = ""  # origin of tensors that are computed from the denoiser's first argument


class ConvLayer(LinearLayer):
    """A two-dimensional convolution, treated as a linear layer applied to patches of its input."""

    @property
    def weight(self) -> Tensor:
        """W as a view, (rows, columns) = (output channels, input channels · kernel height · kernel width)."""
        return self.module.weight.detach().flatten(1)

    def set_weight(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.module.weight.copy_(weight.view_as(self.module.weight))


def input_of(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """Return the input of a call of a layer, which the denoiser may pass by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


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


def _blocks(denoiser: nn.Module) -> list[str]:
    """Return the names of the transformer blocks.

    A block is an item of a module list of which each item contains attention; the innermost such list counts. Attention outside
    of these lists forms a block with the module that contains it.
    """
    modules = dict(denoiser.named_modules())
    attention = [name for name, module in modules.items() if _is_attention(module)]
    lists = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList)
        and all(_within(f"{name}.{item}", attention) for item, _ in module.named_children())
    ]
    roots: list[str] = []
    for name in attention:
        inside = max((outer for outer in lists if name.startswith(f"{outer}.")), key=len, default=None)
        item = name[len(inside) + 1 :].partition(".")[0] if inside is not None else ""
        root = name.rpartition(".")[0] if inside is None else f"{inside}.{item}"
        if not any(root == other or root.startswith(f"{other}.") for other in roots):
            roots.append(root)
    return roots


def _is_attention(module: nn.Module) -> bool:
    """Tell attention by its projection ``to_q`` or, where all projections are one layer, by the name of its class."""
    if hasattr(module, "to_q"):
        return True
    return bool(re.search("attention|attn", type(module).__name__, re.IGNORECASE)) and any(
        isinstance(child, nn.Linear) for child in module.children()
    )


def _within(root: str, names: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for name in names)


@dataclass(frozen=True)
class Layout:
    """How a denoiser uses its candidate layers.

    Attributes:
        units: layers to prune, sorted by dependency: each unit depends only on the outputs of earlier units.
        per_image: layers whose input is one vector per image, such as the modulation by the time step.
        uncalled: layers that the denoiser does not call.
        recurrent: layers that the denoiser calls several times, with inputs that depend on their own outputs; in no unit.
    """

    units: list[Unit]
    per_image: list[str]
    uncalled: list[str]
    recurrent: list[str]


def check_recurrent(layout: Layout, wanted: Callable[[str], bool]) -> None:
    """Check that no wanted layer depends on its own output.

    Raises:
        RoseExpError: ``wanted`` is true for such a layer.
    """
    for name in layout.recurrent:
        if wanted(name):
            raise RoseExpError(
                f"{name} is called several times in one step, with inputs that depend on its own output, and cannot be pruned; "
                "add it to pipeline.skip to leave it dense"
            )


def check_stacked(denoiser: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    """Check that the wanted weights of the transformer blocks are in layers that can be pruned.

    Experts in one tensor are not. Small tensors, such as tables of shifts, are ignored.

    Returns:
        Names of the tensors that hold a substantial share of their block's weights and are in no layer.
    Raises:
        RoseExpError: ``wanted`` is true for one of them.
    """
    found = {}
    for root in _blocks(denoiser):
        block = denoiser.get_submodule(root)
        size = sum(parameter.numel() for parameter in block.parameters())
        for name, module in block.named_modules(prefix=root):
            if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                stacks = [(key, p.numel() / size) for key, p in module.named_parameters(name, recurse=False) if p.ndim > 2]
                found |= {key: share for key, share in stacks if share > SUBSTANTIAL}
    for name, share in found.items():
        if wanted(name):
            raise RoseExpError(
                f"{name} holds {share:.0%} of its block's weights and is not a linear layer, so it cannot be pruned; add it to "
                "pipeline.skip to leave it dense"
            )
    return list(found)


def find_units(denoiser: nn.Module, call: DenoiserCall, layers: Sequence[LinearLayer]) -> Layout:
    """Group layers into units by dependency.

    The denoiser runs once with the arguments of ``call``. Operations on tensors give the dependencies, in any gradient mode.
    A layer processes tokens if its input has more than two dimensions, or depends on the first argument, which contains the
    latents. The second case is that of experts, whose inputs are flat. A layer that the denoiser calls several times, such as
    an FFN that image and text share, forms a group with layers that have all inputs in common.

    Raises:
        RoseExpError: no layer has tokens as input.
    """
    recurrent: list[str] = []
    while True:
        calls = _calls(denoiser, call, [layer for layer in layers if layer.name not in recurrent])
        graph = {name: found.depends_on - {LATENTS} for name, found in calls.items()}
        try:
            order = list(TopologicalSorter(graph).static_order())
            break
        except CycleError as error:
            recurrent += dict.fromkeys(error.args[1])
    levels: dict[str, int] = {}
    from_latents: set[str] = set()
    for name in order:
        before = calls[name].depends_on
        levels[name] = 1 + max((levels[other] for other in before - {LATENTS}), default=-1)
        if LATENTS in before or not from_latents.isdisjoint(before):
            from_latents.add(name)
    by_level: dict[int, dict[tuple[int, ...], list[str]]] = {}
    per_image: list[str] = []
    for name, found in calls.items():
        if found.tokens or name in from_latents:
            by_level.setdefault(levels[name], {}).setdefault(tuple(found.inputs), []).append(name)
        else:
            per_image.append(name)
    if not by_level:
        raise RoseExpError(f"{type(denoiser).__name__} has no attention or feed-forward layer with tokens as input")
    units = [Unit(tuple(tuple(names) for names in by_level[level].values())) for level in sorted(by_level)]
    return Layout(units, per_image, [layer.name for layer in layers if layer.name not in {*calls, *recurrent}], recurrent)


def _calls(denoiser: nn.Module, call: DenoiserCall, layers: Sequence[LinearLayer]) -> dict[str, _Uses]:
    """Run the denoiser once, and return the calls of each layer, in the order of the first ones."""
    probe = _Probe()
    with ExitStack() as stack:
        for layer in layers:
            probe.watch(layer, stack)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would hide operations
        stack.enter_context(probe.origins)
        probe.origins.mark(_first_argument(denoiser, call), {LATENTS})
        denoiser(*call.args, **call.kwargs)
    return probe.calls


def _first_argument(denoiser: nn.Module, call: DenoiserCall) -> Any:
    bound = inspect.signature(denoiser.forward).bind(*call.args, **call.kwargs)
    return next(iter(bound.arguments.values()))


def split_into_packages(units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """Split the units into ``count`` consecutive packages whose sizes differ by at most one; fewer if there are fewer units."""
    count = min(count, len(units))
    bounds = [len(units) * i // count for i in range(count + 1)]
    return [list(units[start:end]) for start, end in pairwise(bounds)]


@dataclass
class _Uses:
    """The calls of a layer in one call of the denoiser.

    Attributes:
        inputs: number of the input tensor of each call.
        tokens: whether an input has more than two dimensions.
        depends_on: names of the layers whose outputs the inputs are computed from, without further layers in between.
    """

    inputs: list[int] = field(default_factory=list)
    tokens: bool = False
    depends_on: set[str] = field(default_factory=set)


class _Origins(TorchDispatchMode):
    """Tracks the origins of all tensors: each operation passes on those of its inputs.

    Tensors that share memory share their origins.
    """

    supports_higher_order_operators = True  # such as flex attention

    def __init__(self):
        super().__init__()
        self.of: dict[StorageWeakRef, set[str]] = {}  # the references keep a freed address from being reused

    def __torch_dispatch__(self, operation: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        origins = set().union(*(self.read(tensor) for tensor in _tensors((args, kwargs))))
        for tensor in _tensors(output):
            self.of[StorageWeakRef(tensor.untyped_storage())] = origins
        return output

    def mark(self, value: Any, origins: set[str]) -> None:
        """Set the origins of all tensors in a nested structure."""
        for tensor in _tensors(value):
            self.of[StorageWeakRef(tensor.untyped_storage())] = origins

    def read(self, tensor: Tensor) -> set[str]:
        return self.of.get(StorageWeakRef(tensor.untyped_storage()), set())


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Probe:
    """Hooks that record the inputs of each layer. The output of a layer has only this layer as its origin."""

    def __init__(self):
        self.calls: dict[str, _Uses] = {}
        self.origins = _Origins()
        self.inputs: list[weakref.ref] = []  # the address of a freed tensor is reused

    def watch(self, layer: LinearLayer, stack: ExitStack) -> None:
        def before(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            uses, inputs = self.calls.setdefault(layer.name, _Uses()), input_of(args, kwargs)
            number = next((i for i, kept in enumerate(self.inputs) if kept() is inputs), len(self.inputs))
            if number == len(self.inputs):
                self.inputs.append(weakref.ref(inputs))
            uses.inputs.append(number)
            uses.tokens |= isinstance(layer, ConvLayer) or inputs.ndim > 2
            uses.depends_on |= self.origins.read(inputs)

        def after(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            self.origins.mark(output, {layer.name})

        pre_hook = layer.module.register_forward_pre_hook(before, with_kwargs=True)
        for hook in (pre_hook, layer.module.register_forward_hook(after)):
            stack.callback(hook.remove)
