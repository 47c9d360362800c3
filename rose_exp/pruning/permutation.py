"""Channel permutation: finds layers whose input channels can be reordered, and reorders them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine import InputMoments, SemiStructured
from ..engine.permutation import channel_order
from ..models import LinearLayer, linear_layers
from .component import Component, Group

if TYPE_CHECKING:
    from .blocks import BlockUnit
    from .collect import GroupInputs
    from .context import PruneContext
    from .plan import PruningPlan

SAME = 1e-5  # relative tolerance for equal inputs with another summation order; at least half the dtype's epsilon
SIMILAR = 0.05  # relative tolerance for what a block adds to its hidden states; a wrong order changes it far more


@dataclass(frozen=True)
class Channels:
    """A layer whose input columns can be reordered together with the output rows of the layers that produce them.

    The columns consist of ``units`` (key-value heads of an attention, or 1), each repeated ``copies`` times (for the query
    heads that share it), with ``width`` channels each. The rows of the makers contain each unit once. Channels can be
    reordered within a unit.

    Attributes:
        layer: name of the layer.
        makers: names of the layers that produce its inputs.
    """

    layer: str
    makers: tuple[str, ...]
    units: int
    copies: int
    width: int

    def columns(self, orders: Tensor) -> Tensor:
        """Return the column order of the layer, (columns,) int64, from the channel order of each unit (units, width)."""
        return self._places(orders)[:, None].expand(-1, self.copies, -1).add(self._copy_starts(orders)).flatten()

    def rows(self, orders: Tensor) -> Tensor:
        """Return the row order of the makers, (rows,) int64."""
        return (orders + torch.arange(self.units, device=orders.device)[:, None] * self.width).flatten()

    def by_unit(self, scores: Tensor) -> Tensor:
        """Rearrange scores of the layer's weights (rows, columns) to (units, rows · copies, width)."""
        return scores.unflatten(1, (self.units, self.copies, self.width)).permute(1, 0, 2, 3).flatten(1, 2)

    def _places(self, orders: Tensor) -> Tensor:
        return orders + torch.arange(self.units, device=orders.device)[:, None] * (self.copies * self.width)

    def _copy_starts(self, orders: Tensor) -> Tensor:
        return (torch.arange(self.copies, device=orders.device) * self.width)[:, None]


@torch.no_grad()
def find_channels(run: Callable[[Tensor], Tensor], block: nn.Module, name: str, hidden: Tensor) -> list[Channels]:
    """Find the layers of a block whose input channels can be reordered.

    Selects candidates by their sizes and tests each one: after the outputs of the makers are reordered, the layer's inputs
    must be the previous inputs in that order.

    Args:
        run: forward pass of the block, from hidden states to hidden states.
        name: full name of the block in the model.
        hidden: real inputs of the block, (windows, tokens, width).
    """
    layers = [layer for layer in linear_layers(block, name) if not layer.of_expert]
    by_name, reorderable = {layer.name: layer for layer in layers}, []
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        siblings = [x for x in layers if x is not layer and x.name.rpartition(".")[0] == parent]
        head = getattr(block.get_submodule(parent.removeprefix(name).removeprefix(".")), "head_dim", None)
        for candidate in _candidates(layer, siblings, head):
            if _can_reorder(candidate, by_name, run, hidden):
                reorderable.append(candidate)
                break
    return reorderable


def _candidates(layer: LinearLayer, siblings: Sequence[LinearLayer], head: int | None) -> Iterator[Channels]:
    for other in siblings:
        rows = len(other.weight)
        if head and rows % head == 0 and layer.columns % rows == 0:
            yield Channels(layer.name, (other.name,), rows // head, layer.columns // rows, head)
    makers = [other.name for other in siblings if len(other.weight) == layer.columns]
    if makers:
        yield Channels(layer.name, tuple(makers), 1, 1, layer.columns)


def _can_reorder(candidate: Channels, layers: dict[str, LinearLayer], run: Callable[[Tensor], Tensor], hidden: Tensor) -> bool:
    """Return whether reordering the makers' outputs reorders the layer's inputs and affects nothing else in the block.

    The second condition holds if the block returns the same output once the layer's inputs are put back in order.
    """
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(candidate.width, generator=generator) for _ in range(candidate.units)])
    orders = orders.to(hidden.device)
    rows, columns = candidate.rows(orders), candidate.columns(orders)
    layer_inputs: list[Tensor] = []

    def watch(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x = args[0] if args else kwargs["input"]
        layer_inputs.append(x)
        restored = x if len(layer_inputs) == 1 else torch.empty_like(x).index_copy_(-1, columns, x)
        return (restored, *args[1:]), {name: value for name, value in kwargs.items() if name != "input"}

    with ExitStack() as stack:
        stack.callback(layers[candidate.layer].module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        original = run(hidden)
        for name in candidate.makers:
            hook = layers[name].module.register_forward_hook(lambda _module, _args, output: output[..., rows])
            stack.callback(hook.remove)
        again = run(hidden)
    if len(layer_inputs) != 2 or not torch.isfinite(layer_inputs[0]).all():
        return False
    tolerance = max(SAME, torch.finfo(hidden.dtype).eps / 2)
    same_inputs = _is_close(layer_inputs[1], layer_inputs[0][..., columns], tolerance)
    return same_inputs and _is_close(again - hidden, original - hidden, SIMILAR)


def _is_close(actual: Tensor, expected: Tensor, share: float) -> bool:
    norm = expected.float().norm()
    return bool(norm > 0 and (actual.float() - expected.float()).norm() <= share * norm)


class ChannelOrders:
    """Reorders the channels of a block's layers during pruning.

    Attributes:
        pending: orders not yet applied to the makers, (units, width) by name of the layer that reads the channels.
    """

    def __init__(self, layers: Mapping[str, LinearLayer], channels: Sequence[Channels]):
        self.layers, self.channels = layers, {layer_channels.layer: layer_channels for layer_channels in channels}
        self.pending: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.channels

    def makers(self, name: str) -> tuple[str, ...]:
        """Return the names of the layers that produce a layer's inputs; empty if its channels cannot be reordered."""
        return self.channels[name].makers if name in self.channels else ()

    def reordered(self, name: str) -> bool:
        """Return whether a pending order changes the channels of a layer."""
        orders = self.pending.get(name)
        return orders is not None and bool((orders.diff(dim=1) < 0).any())

    def order(self, layer: LinearLayer, moments: InputMoments, sparsity: SemiStructured) -> Tensor:
        """Reorder the input channels of a layer to minimize the pattern's expected loss, estimated by W²·E[x²].

        Returns:
            The order of the columns, (columns,) int64, to apply to the input statistics.
        """
        channels = self.channels[layer.name]
        scores = channels.by_unit(layer.weight.float().square() * moments.mean_square())
        if channels.units * channels.copies > 1 and channels.width % sparsity.group:  # groups span two units
            orders = torch.arange(channels.width, device=scores.device).repeat(channels.units, 1)
        else:
            orders = torch.stack([channel_order(unit_scores, sparsity) for unit_scores in scores])
        columns = channels.columns(orders)
        layer.set_weight(layer.weight[:, columns])
        self.pending[layer.name] = orders.cpu()
        return columns

    def order_makers(self, orders: Mapping[str, Tensor]) -> None:
        """Apply the orders to the outputs of the layers that produce the inputs, and clear the pending ones."""
        for name, unit_orders in orders.items():
            for maker in self.makers(name):
                layer = self.layers[maker]
                rows = self.channels[name].rows(unit_orders.to(layer.weight.device))
                layer.set_weight(layer.weight[rows])
                if layer.module.bias is not None:
                    layer.module.bias.data.copy_(layer.module.bias.data[rows])
        self.pending = {}


class ChannelPermutation(Component):
    """Permutes the input channels of N:M layers before they are pruned, and the outputs of the layers that produce them."""

    def __init__(self):
        self.orders = ChannelOrders({}, [])

    @classmethod
    def create(cls, plan: PruningPlan, context: PruneContext) -> ChannelPermutation | None:
        return cls() if plan.permutes else None

    def before_unit(self, unit: BlockUnit) -> None:
        self.orders = ChannelOrders(unit.layers, unit.channels)

    def before_solve(self, unit: BlockUnit, group: Group, inputs: GroupInputs) -> None:
        if group[0].name not in self.orders:
            return
        columns = self.orders.order(group[0], inputs.moments, unit.plan.sparsity)
        inputs.moments = inputs.moments.permuted(columns)
        inputs.cross_moments = inputs.cross_moments.permuted(columns) if inputs.cross_moments is not None else None

    def facts(self, unit: BlockUnit, name: str) -> dict[str, Any]:
        return {"permuted": self.orders.reordered(name)}

    def outgoing(self, unit: BlockUnit) -> dict[str, Tensor]:
        return self.orders.pending

    def after_groups(self, unit: BlockUnit, names: Collection[str], answers: Sequence[dict[str, Tensor]]) -> None:
        self.orders.order_makers({name: order for orders in answers for name, order in orders.items()})

    def also_changed(self, unit: BlockUnit, names: Collection[str]) -> set[str]:
        return {maker for name in names for maker in self.orders.makers(name)}
