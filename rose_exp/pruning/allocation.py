"""Survey of the dense model's layers, from which the sparsity allocation is computed before pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engine.allocation import Allocation, BlockSurvey, loss_histogram, outlier_share
from ..models import LinearLayer
from ..runtime.errors import RoseExpError
from ..runtime.ranks import Ranks
from .activations import Activations
from .component import Component

if TYPE_CHECKING:
    from .blocks import BlockPruner, BlockUnit
    from .context import PruneContext
    from .plan import PruningPlan


class AllocationSurvey(Component):
    """Chooses the sparsity of each layer before pruning, from a forward pass of the dense model."""

    def __init__(self, allocation: Allocation, context: PruneContext):
        self.allocation, self.context = allocation, context

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> AllocationSurvey | None:
        return cls(plan.allocation, context) if plan.allocation else None

    def before_model(self, pruner: BlockPruner) -> None:
        state = self.context.state
        shares = dict(state.progress.shares) if state is not None else {}
        if not shares:
            shares = self._survey(pruner)
            if state is not None:
                state.keep_shares(shares)
        pruner.plan = replace(pruner.plan, shares=shares)

    def _survey(self, pruner: BlockPruner) -> dict[str, float]:
        file = pruner.folder / "survey"
        hidden, surveys = pruner.hidden.copy(file), []
        for index in tqdm(range(pruner.units), "surveying", unit="block", disable=None):
            self.context.check_stop_between_units()
            with pruner.unit(index, original=True) as unit:
                surveys.append(self._survey_unit(pruner, unit, hidden))
        file.unlink(missing_ok=True)
        shares = self.allocation.shares(surveys, pruner.plan.sparsity.ratio)
        return self.context.ranks.gather(shares)[0]  # ranks may disagree through rounding

    def _survey_unit(self, pruner: BlockPruner, unit: BlockUnit, hidden: Activations) -> BlockSurvey:
        """Run the dense block on the hidden states, which its outputs replace, and return the survey of its layers."""
        seconds, context = self.context.seconds, self.context
        start, advancing = context.now(), seconds.advancing
        watch = BlockWatch(unit.groups, context.device)
        with ExitStack() as stack:
            watch.hooks(stack)
            pruner.advance(unit, hidden, "dense")
        survey = watch.survey(self.allocation, context.ranks)
        seconds.advancing = advancing
        seconds.surveying += context.now() - start
        return survey


class BlockWatch:
    """Collects statistics of a block's layers during a forward pass of the dense block.

    Args:
        groups: the layers, grouped by shared input.
    """

    def __init__(self, groups: Sequence[Sequence[LinearLayer]], device: torch.device | str):
        self.groups = groups
        self.squares = [torch.zeros(group[0].columns, dtype=torch.float64, device=device) for group in groups]  # Σ x²
        self.powers = {layer.name: torch.zeros((), dtype=torch.float64, device=device) for group in groups for layer in group}
        self.tokens = torch.zeros(len(groups), dtype=torch.float64, device=device)

    def hooks(self, stack: ExitStack) -> None:
        """Register hooks that are removed when ``stack`` exits."""
        for place, group in enumerate(self.groups):
            stack.callback(group[0].module.register_forward_pre_hook(self._input(place), with_kwargs=True).remove)
            for layer in group:
                stack.callback(layer.module.register_forward_hook(self._output(layer)).remove)

    def survey(self, allocation: Allocation, ranks: Ranks) -> BlockSurvey:
        """Return the survey over all ranks, without layers that receive no token or whose output is zero.

        Raises:
            RoseExpError: the expected loss of a layer is not finite; the message names the layer.
        """
        for sums in (*self.squares, *self.powers.values(), self.tokens):
            ranks.add_up(sums)
        seen = [
            (layer, squares / tokens, self.powers[layer.name] / tokens)
            for squares, tokens, group in zip(self.squares, self.tokens, self.groups, strict=True)
            for layer in group
            if tokens > 0 and self.powers[layer.name] > 0
        ]
        sizes = {layer.name: layer.weight.numel() for layer, _, _ in seen}
        if allocation.rule == "losses":
            return BlockSurvey(sizes, histograms={layer.name: _histogram(layer, *facts) for layer, *facts in seen})
        scores = [layer.weight.float().abs() * mean_square.sqrt().float() for layer, mean_square, _ in seen]
        return BlockSurvey(sizes, outlier_share(scores, allocation.outlier) if scores else 0.0)

    def _input(self, place: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["input"]).flatten(0, -2)
            self.squares[place] += x.float().square().sum(dim=0)
            self.tokens[place] += len(x)

        return hook

    def _output(self, layer: LinearLayer) -> Callable[..., None]:
        def hook(module: nn.Module, _args: tuple, output: Tensor) -> None:
            bias = getattr(module, "bias", None)
            product = output.float() if bias is None else output.float() - bias.float()
            self.powers[layer.name] += product.square().sum()

        return hook


def _histogram(layer: LinearLayer, mean_square: Tensor, power: Tensor) -> Tensor:
    try:
        return loss_histogram(layer.weight, mean_square, power)
    except ValueError as error:
        raise RoseExpError(f"{layer.name}: {error}") from error
