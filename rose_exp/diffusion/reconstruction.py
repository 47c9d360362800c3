"""Block reconstruction for denoisers: trains the kept weights of each pruned block to reproduce the dense denoiser.

A block is trained once all of its layers are pruned, on calls of the denoiser that the dense pipeline makes while it generates
the calibration images. The inputs of a block are those in the partly pruned denoiser, and the targets are its outputs in the
dense one. As in the Hessian, α_t weights the denoising steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from tqdm import tqdm

from ..models import LinearLayer
from ..pruning.block_training import Training, at_least_float32
from ..pruning.calls import to_device
from ..pruning.capture import StopForward
from ..pruning.component import Component
from ..pruning.context import PruneContext
from ..pruning.reconstruction import trainable
from ..pruning.unit import Unit
from ..runtime.errors import RoseExpError
from ..settings.reconstruction import Reconstruction
from .denoiser import DenoiserCall

if TYPE_CHECKING:
    from .packages import PackagePruner

CALLS = 4  # calls of the denoiser that are kept for each batch of prompts
GOLDEN = 0.618034  # shifts the kept steps from batch to batch, so that together they cover all steps evenly


def blocks_of(denoiser: nn.Module, layers: Sequence[str]) -> dict[str, list[str]]:
    """Return the layers of each block.

    A block is the innermost element of a module list with at least two of the layers, such as a transformer block.

    Args:
        layers: full names of layers.
    Returns:
        Names of layers by the full name of their block. Layers outside and between blocks are left out, such as convolutions
        that change the resolution.
    """
    blocks: dict[str, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        for length in range(len(parts) - 1, 1, -1):
            block = ".".join(parts[:length])
            inside = [other for other in layers if other.startswith(f"{block}.")]
            if len(inside) > 1 and isinstance(denoiser.get_submodule(".".join(parts[: length - 1])), nn.ModuleList):
                blocks.setdefault(block, []).append(name)
                break
    outer = {block for block in blocks for other in blocks if other.startswith(f"{block}.")}
    return {block: names for block, names in blocks.items() if block not in outer}


def kept_steps(batch: int, steps: int) -> list[int]:
    """Return the steps whose calls are kept for a batch of prompts, spread evenly over all steps."""
    count = min(CALLS, steps)
    shift = batch * GOLDEN % 1
    return [int((place + shift) * steps / count) for place in range(count)]


@dataclass
class Calls:
    """Calls of the denoiser, or of one block.

    Attributes:
        calls: arguments, in host memory.
        weights: α_t of each call's step.
        pieces: the calls of each batch of prompts. Training holds out whole batches.
    """

    calls: list[DenoiserCall] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    pieces: list[slice] = field(default_factory=list)


@dataclass
class BlockStage:
    """A block of a denoiser that is trained at once.

    Attributes:
        inputs: calls of the block in the pruned denoiser.
        targets: outputs of the block in the dense denoiser for each call, in host memory.
    """

    unit: Unit
    inputs: Calls
    targets: list[list[Tensor]]

    def error(self, calls: slice) -> Tensor:
        """Return the sum over calls and tokens of the squared errors, relative to the squared norms of the targets."""
        device = next(self.unit.module.parameters()).device
        total = torch.zeros((), device=device)
        for place in range(calls.start, calls.stop):
            call = _moved(self.inputs.calls[place], device)
            outputs = _states(self.unit.module(*call.args, **call.kwargs))
            for output, target in zip(outputs, self.targets[place], strict=True):
                channels = -1 if target.ndim == 3 else 1
                target = at_least_float32(target.to(device))
                errors, powers = (s.square().sum(dim=channels) for s in (output.to(target) - target, target))
                share = (errors / powers.clamp(min=torch.finfo(torch.float32).tiny)).sum()
                total = total + self.inputs.weights[place] * share
        return total


class DenoiserReconstruction(Component):
    """Trains each block of a denoiser once its last layer is pruned.

    Attributes:
        blocks: layers of each block, in the order in which the denoiser calls the blocks.
        ratios: error of each trained block on the held-out calls, relative to the error before the reconstruction.
    """

    def __init__(self, options: Reconstruction, context: PruneContext):
        self.options, self.context = options, context
        self.blocks: dict[str, list[str]] = {}
        self.calls = Calls()
        self.dense: dict[str, Tensor] = {}
        self.changed: set[str] = set()
        self.ratios: dict[str, float] = {}

    def check(self, pruner: PackagePruner) -> None:
        names = [name for package in pruner.packages for unit in package for name in unit.names]
        self.blocks = blocks_of(pruner.sampler.denoiser, names)
        inside = {name for layers in self.blocks.values() for name in layers}
        reason = "its weights are not trained, because it is not part of a block"
        self.context.warn("not_reconstructed", [name for name in names if name not in inside], reason)

    def before_model(self, pruner: PackagePruner) -> None:
        """Keep the dense weights, and record calls of the dense denoiser."""
        start = self.context.now()
        self.pruner, self.denoiser = pruner, pruner.sampler.denoiser
        self.calls = self._record(pruner)
        if len(self.calls.pieces) < 2:
            raise RoseExpError(
                "calibration.samples: expected at least two batches of prompts with a reconstruction, which holds one out to "
                f"measure its error, got {len(self.calls.pieces)}; lower diffusion.batch or raise calibration.samples"
            )
        self.blocks = self._in_call_order(self.blocks)
        self.dense = {name: p.detach().to("cpu", copy=True) for name, p in self.denoiser.named_parameters()}
        self.context.seconds.reconstructing += self.context.now() - start

    def _record(self, pruner: PackagePruner) -> Calls:
        """Generate the calibration images once, and keep some calls of each batch."""
        found, step_of, batch = Calls(), (0, 1), -1
        copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id; holds the originals, so that no id is reused

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in copies:
                copies[id(value)] = value, _on_host(value)
            return copies[id(value)][1]

        def on_step(step: int, steps: int) -> None:
            nonlocal step_of, batch
            step_of, batch = (step, steps), batch + (step == 0)

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            step, steps = step_of
            if step == 0:
                copies.clear()
                found.pieces.append(slice(len(found.calls), len(found.calls)))
            if step in kept_steps(batch, steps):
                found.calls.append(DenoiserCall(*tree_map(copied, (args, kwargs))))
                found.weights.append(pruner.weights(step, steps))
                found.pieces[-1] = slice(found.pieces[-1].start, len(found.calls))

        with ExitStack() as stack:
            stack.enter_context(pruner.sampler.steps(on_step))
            stack.callback(self.denoiser.register_forward_pre_hook(keep, with_kwargs=True).remove)
            for _ in pruner.sampler.run(pruner.prompts, pruner.seeds, "recording calls", decode=False):
                pass
        return found

    def _in_call_order(self, blocks: Mapping[str, list[str]]) -> dict[str, list[str]]:
        order: list[str] = []
        with ExitStack() as stack:
            for name in blocks:
                hook = self.denoiser.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
                stack.callback(hook.remove)
            self._run(self.calls.calls[0])
        return {name: blocks[name] for name in order}

    def before_unit(self, unit: Unit) -> None:
        """Note the layers that pruning the unit changes, including those that produce removed heads and neurons."""
        names = {layer.name for group in unit.groups for layer in group}
        self.changed |= names | self.pruner.changed_with(unit, names)

    def after_unit(self, unit: Unit) -> None:
        start = self.context.now()
        for name in self.completed(unit.index):
            self._train(unit, name)
        self.context.seconds.reconstructing += self.context.now() - start

    def completed(self, index: int) -> list[str]:
        """Return the blocks whose last layer is in the package ``index``, in call order."""
        packages = [{name for unit in package for name in unit.names} for package in self.pruner.packages[: index + 1]]
        done, last = set().union(*packages), packages[-1]
        return [name for name, layers in self.blocks.items() if done.issuperset(layers) and not last.isdisjoint(layers)]

    def _train(self, unit: Unit, name: str) -> None:
        block = self.denoiser.get_submodule(name)
        layers = {
            f"{name}.{m}": LinearLayer(f"{name}.{m}", part) for m, part in block.named_modules() if type(part) is nn.Linear
        }
        layers |= {layer: self.pruner.layers[layer] for layer in self.blocks[name]}
        part = Unit(unit.index, name, block, name, unit.plan, layers, [])
        inputs, targets = self._inputs_and_targets(name)
        training = Training(BlockStage(part, inputs, targets), self.options, self.context)
        before = training.held_out_error()
        if not before > 0:
            return
        training.run(trainable(part, [layer for key, layer in layers.items() if key in self.changed], set()))
        self.ratios[name] = training.held_out_error() / before

    def _inputs_and_targets(self, name: str) -> tuple[Calls, list[list[Tensor]]]:
        """Return the block's calls in the pruned denoiser, and its outputs in the dense one."""
        inputs: list[DenoiserCall] = []
        targets: list[list[Tensor]] = []

        def keep_inputs(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(DenoiserCall(*tree_map(_on_host, (args, kwargs))))
            raise StopForward

        def keep_outputs(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            targets.append([_on_host(state) for state in _states(output)])
            raise StopForward

        block = self.denoiser.get_submodule(name)
        with ExitStack() as stack:
            stack.callback(block.register_forward_pre_hook(keep_inputs, with_kwargs=True).remove)
            self._run_all(f"running {name}")
        with self._dense_weights(), ExitStack() as stack:
            stack.callback(block.register_forward_hook(keep_outputs).remove)
            self._run_all(f"running dense {name}")
        return Calls(inputs, self.calls.weights, self.calls.pieces), targets

    def _run_all(self, what: str) -> None:
        for call in tqdm(self.calls.calls, what, leave=False, disable=None, unit="call"):
            self.context.check_stop_between_batches()
            self._run(call)

    def _run(self, call: DenoiserCall) -> None:
        call = _moved(call, self.context.device)
        with suppress(StopForward):
            self.denoiser(*call.args, **call.kwargs)

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        """Give the denoiser its dense weights while the body runs."""
        parameters = dict(self.denoiser.named_parameters())
        pruned = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.dense[name].to(parameter.device)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = pruned[name]

    def ratio_of(self, layer: str) -> float | None:
        """Return the ratio of the layer's block; None if it has not been trained."""
        return next((self.ratios.get(block) for block, layers in self.blocks.items() if layer in layers), None)


def _states(output: Any) -> list[Tensor]:
    """Return the hidden states in the output of a block."""
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _on_host(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    # contiguous, because torch 2.13 crashes in the backward pass of GroupNorm on channels-last inputs
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _moved(call: DenoiserCall, device: torch.device | str) -> DenoiserCall:
    return DenoiserCall(*to_device((call.args, call.kwargs), device, {}))
