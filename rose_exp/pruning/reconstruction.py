"""Block reconstruction: trains the kept weights of a pruned block to reproduce the dense model's hidden states.

The inputs are the hidden states of the pruned model, the targets those of the dense model. The masks stay fixed, and the biases
and norms of the block are trained as well. Training attention and MLP separately follows "A Free Lunch in LLM Compression"
(arXiv 2510.14444), training the whole block follows EBFT (arXiv 2402.12419).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models import LinearLayer, unstacked_experts
from ..runtime.errors import RoseExpError
from ..settings.reconstruction import Reconstruction
from .activations import Activations
from .block_training import Training, at_least_float32
from .capture import StopForward
from .component import Component

if TYPE_CHECKING:
    from .blocks import BlockPruner, BlockUnit
    from .context import PruneContext
    from .plan import PruningPlan


class BlockReconstruction(Component):
    """Trains each block after its layers are pruned.

    Attributes:
        inner: hidden states of the dense model after each layer of :attr:`BlockUnit.stages`.
        outputs: outputs of the dense block. They become the inputs of the next one, and its inputs are overwritten.
        ratio: error of the current block on the held-out windows, relative to the error before the reconstruction.
    """

    def __init__(self, options: Reconstruction, context: PruneContext):
        self.options, self.context = options, context
        self.pruner: BlockPruner | None = None
        self.inner: list[Activations] = []
        self.outputs: Activations | None = None
        self.ratio: float | None = None

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> BlockReconstruction | None:
        return cls(plan.reconstruction, context) if plan.reconstruction else None

    def before_model(self, pruner: BlockPruner) -> None:
        batches = sum(self.context.ranks.gather(len(pruner.hidden.pieces)))
        if batches < 2:
            raise RoseExpError(
                "calibration.samples: expected at least two batches of windows with a reconstruction, which holds one out to "
                f"measure its error, got {batches}; lower pipeline.batch or raise calibration.samples"
            )
        if pruner.plan.staged:
            undivided = [pruner.blocks.block_name(index) for index in range(pruner.units) if not pruner.stages(index)]
            reason = "all layers are trained at once, because the block does not add the attention's output to its inputs"
            self.context.warn("reconstructed_together", undivided, reason)
        self.pruner = pruner
        if pruner.dense is None:
            pruner.dense = pruner.hidden.copy(pruner.folder / "dense")
        self.outputs = pruner.dense.empty_like(pruner.folder / "dense_outputs")

    def before_unit(self, unit: BlockUnit) -> None:
        """Run the dense block on the dense model's hidden states, and keep the targets of all stages."""
        context, start, dense = self.context, self.context.now(), self.pruner.dense
        self.ratio = None
        for number in range(len(self.inner), len(unit.stages)):
            self.inner.append(dense.empty_like(self.pruner.folder / f"dense_inner{number}"))
        for windows, batch in tqdm(dense, f"running dense {unit.name}", len(dense.pieces), False, disable=None, unit="batch"):
            context.check_stop_between_batches()
            with added_outputs(unit, unit.stages) as added, unstacked_experts(unit.module):
                self.outputs[windows] = unit.dense_calls[windows.start].run(unit.module, batch)
            for stage, states in enumerate(partial_sums(batch, added)):
                self.inner[stage][windows] = states
        context.seconds.reconstructing += context.now() - start

    def after_unit(self, unit: BlockUnit) -> None:
        context, start, pruner = self.context, self.context.now(), self.pruner
        whole = Training(Stage(unit, [], True, pruner.hidden, self.outputs), self.options, context)
        before = whole.held_out_error() if unit.groups else 0.0
        if before > 0:
            inner = [
                Training(Stage(unit, unit.stages[: n + 1], False, pruner.hidden, self.inner[n]), self.options, context)
                for n in range(len(unit.stages))
            ]
            done: set[int] = set()
            names = {report.name for report in unit.reports if report.fallback != "dense"}  # starved experts stay dense
            if unit.plan.structured:  # the layers that produce removed heads and neurons have no reports
                names |= pruner.changed_with(unit, names)
            for training, layers in zip([*inner, whole], layers_of_stages(unit, names), strict=True):
                parameters = trainable(unit, layers, done) if layers else []
                training.run(parameters)
                done |= {id(parameter) for parameter, _ in parameters}
            self.ratio = whole.held_out_error() / before
        pruner.dense, self.outputs = self.outputs, pruner.dense
        context.seconds.reconstructing += context.now() - start

    def unit_facts(self, unit: BlockUnit) -> dict[str, Any]:
        return {"reconstruction": self.ratio}


def layers_of_stages(unit: BlockUnit, pruned: Collection[str]) -> list[list[LinearLayer]]:
    """Return the pruned layers of each stage: those called up to its last layer, and after that of the stage before.

    Args:
        pruned: names of the layers that pruning has changed.
    """
    found: list[list[LinearLayer]] = [[]]
    ends = set(unit.stages)
    for name in unit.called:
        if name in pruned:
            found[-1].append(unit.layers[name])
        if name in ends:
            found.append([])
    return found


def trainable(unit: BlockUnit, layers: Sequence[LinearLayer], done: set[int]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the parameters to train, with masks of the entries to train.

    These are the kept weights of ``layers``, their biases, and the other vectors of the block, such as the weights of norms.

    Args:
        done: the ``id`` of each parameter that an earlier stage has trained.
    """
    names = {layer.name for layer in layers}
    fixed = {id(layer.module.bias) for layer in unit.layers.values() if layer.name not in names} - {id(None)}
    kept = [(layer, (layer.weight != 0).to(layer.weight.dtype)) for layer in layers]
    parameters = [p for p in unit.module.parameters() if p.is_floating_point() and id(p) not in done | fixed]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:  # layers can be views of a stack or transposed, so the masks are written through them
        parameter.data = torch.ones_like(parameter) if parameter.ndim == 1 else torch.zeros_like(parameter)
    try:
        for layer, mask in kept:
            layer.set_weight(mask)
        masks = [parameter.data for parameter in parameters]
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
    return [(parameter, mask) for parameter, mask in zip(parameters, masks, strict=True) if mask.any()]


@contextmanager
def added_outputs(unit: BlockUnit, names: Sequence[str], stop: bool = False) -> Iterator[list[Tensor]]:
    """Record the outputs of layers during a forward pass of the block.

    Args:
        stop: whether to end the pass after the last of them.
    """
    found: list[Tensor] = []

    def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        found.append(output)
        if stop and len(found) == len(names):
            raise StopForward

    with ExitStack() as stack:
        for name in names:
            stack.callback(unit.layers[name].module.register_forward_hook(hook).remove)
        yield found


def partial_sums(hidden: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states after each of these outputs is added."""
    sums = [hidden]
    for output in outputs:
        sums.append(sums[-1] + output.view(hidden.shape))
    return sums[1:]


@dataclass
class Stage:
    """A part of a block that is trained at once.

    Attributes:
        names: layers whose outputs the block adds to its inputs up to the end of the stage.
        final: whether the stage ends with the block.
        inputs, targets: hidden states of the pruned and of the dense model, at the start of the block and the end of the stage.
    """

    unit: BlockUnit
    names: Sequence[str]
    final: bool
    inputs: Activations
    targets: Activations

    def error(self, windows: slice) -> Tensor:
        """Return the sum over a batch of windows of each token's squared error, relative to the squared norm of its target.

        Otherwise a few tokens with massive activations would outweigh all others (Sun et al., arXiv 2402.17762).
        """
        unit, hidden = self.unit, self.inputs[windows]
        call = replace(unit.calls[windows.start], following=None)
        with unstacked_experts(unit.module):
            if self.final:
                output = call.run(unit.module, hidden)
            else:
                with added_outputs(unit, self.names, stop=True) as added, suppress(StopForward):
                    call.run(unit.module, hidden)
                output = partial_sums(hidden, added)[-1]
        target = at_least_float32(self.targets[windows])
        errors, powers = (states.square().sum(dim=-1) for states in (output.to(target) - target, target))
        return (errors / powers.clamp(min=torch.finfo(torch.float32).tiny)).sum()
