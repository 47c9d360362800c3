"""Which layers of a block make another one's inputs channel by channel, found by what that one is fed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import InputMoments, SemiStructured
from ..engine.permutation import channel_order
from ..models import LinearLayer, linear_layers

SAME = 1e-5  # how far inputs may be apart that are equal but for sums in another order; in half precision by half its rounding
SIMILAR = 0.05  # the same of what a block adds to its hidden states, which any wrong order would change altogether


@dataclass(frozen=True)
class Channels:
    """A layer whose input columns can be put in another order when the rows of the layers that make them are.

    The columns are ``units`` (the heads of attention's keys and values, or one), each ``copies`` times (for the query heads
    that share it), of ``width`` channels; the rows of the makers are the units once. Channels may change places inside a unit.

    Attributes:
        layer: name of the layer.
        makers: names of those that make its inputs.
    """

    layer: str
    makers: tuple[str, ...]
    units: int
    copies: int
    width: int

    def columns(self, orders: Tensor) -> Tensor:
        """Of the layer, (columns,) int64, from the order of each unit's channels (units, width)."""
        return self._places(orders)[:, None].expand(-1, self.copies, -1).add(self._copy_starts(orders)).flatten()

    def rows(self, orders: Tensor) -> Tensor:
        """Of the makers, (rows,) int64."""
        return (orders + torch.arange(self.units, device=orders.device)[:, None] * self.width).flatten()

    def by_unit(self, scores: Tensor) -> Tensor:
        """Scores of the layer's weights (rows, columns) as (units, rows · copies, width)."""
        return scores.unflatten(1, (self.units, self.copies, self.width)).permute(1, 0, 2, 3).flatten(1, 2)

    def _places(self, orders: Tensor) -> Tensor:
        return orders + torch.arange(self.units, device=orders.device)[:, None] * (self.copies * self.width)

    def _copy_starts(self, orders: Tensor) -> Tensor:
        return (torch.arange(self.copies, device=orders.device) * self.width)[:, None]


@torch.no_grad()
def find_channels(run: Callable[[Tensor], Tensor], block: nn.Module, name: str, hidden: Tensor) -> list[Channels]:
    """All such layers of a block that the model calls ``name``.

    What is told apart by its sizes alone is tried: the makers' outputs are put in another order, and the layer must be fed with
    what it was fed with before, in that order.

    Args:
        run: the block, from hidden states to hidden states.
        hidden: some real hidden states that enter the block, (windows, tokens, width).
    """
    layers = [layer for layer in linear_layers(block, name) if not layer.of_expert]
    known, found = {layer.name: layer for layer in layers}, []
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        siblings = [x for x in layers if x is not layer and x.name.rpartition(".")[0] == parent]
        head = getattr(block.get_submodule(parent.removeprefix(name).removeprefix(".")), "head_dim", None)
        for tried in _candidates(layer, siblings, head):
            if _holds(tried, known, run, hidden):
                found.append(tried)
                break
    return found


def _candidates(layer: LinearLayer, siblings: Sequence[LinearLayer], head: int | None) -> Iterator[Channels]:
    for other in siblings:
        rows = len(other.weight)
        if head and rows % head == 0 and layer.columns % rows == 0:
            yield Channels(layer.name, (other.name,), rows // head, layer.columns // rows, head)
    as_tall = [other.name for other in siblings if len(other.weight) == layer.columns]
    if as_tall:
        yield Channels(layer.name, tuple(as_tall), 1, 1, layer.columns)


def _holds(tried: Channels, known: dict[str, LinearLayer], run: Callable[[Tensor], Tensor], hidden: Tensor) -> bool:
    """Whether the layer is fed with its inputs in another order when its makers' outputs are put in that order, and nothing
    else in the block is touched: with the layer's inputs put back, the block answers as before."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(tried.width, generator=generator) for _ in range(tried.units)]).to(hidden.device)
    rows, columns = tried.rows(orders), tried.columns(orders)
    seen: list[Tensor] = []

    def watch(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x = args[0] if args else kwargs["input"]
        seen.append(x)
        put_back = x if len(seen) == 1 else torch.empty_like(x).index_copy_(-1, columns, x)
        return (put_back, *args[1:]), {name: value for name, value in kwargs.items() if name != "input"}

    with ExitStack() as stack:
        stack.callback(known[tried.layer].module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        answer = run(hidden)
        for name in tried.makers:
            hook = known[name].module.register_forward_hook(lambda _module, _args, output: output[..., rows])
            stack.callback(hook.remove)
        again = run(hidden)
    if len(seen) != 2 or not torch.isfinite(seen[0]).all():
        return False
    same = max(SAME, torch.finfo(hidden.dtype).eps / 2)
    return _near(seen[1], seen[0][..., columns], same) and _near(again - hidden, answer - hidden, SIMILAR)


def _near(found: Tensor, expected: Tensor, share: float) -> bool:
    norm = expected.float().norm()
    return bool(norm > 0 and (found.float() - expected.float()).norm() <= share * norm)


class ChannelOrders:
    """The orders that a block's channels are put in while its layers are pruned.

    Attributes:
        waiting: orders that the layers that make the inputs have not been put in yet, (units, width) by the name of the layer
            that is fed with them.
    """

    def __init__(self, layers: Mapping[str, LinearLayer], channels: Sequence[Channels]):
        self.layers, self.channels = layers, {of_layer.layer: of_layer for of_layer in channels}
        self.waiting: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.channels

    def makers(self, name: str) -> tuple[str, ...]:
        """Names of the layers that make the inputs of this one; none where its channels have to stay."""
        return self.channels[name].makers if name in self.channels else ()

    def moved(self, name: str) -> bool:
        """Whether an order is waiting for this layer that is not the natural one."""
        orders = self.waiting.get(name)
        return orders is not None and bool((orders.diff(dim=1) < 0).any())

    def order(self, layer: LinearLayer, moments: InputMoments, sparsity: SemiStructured) -> Tensor:
        """Put the input channels of a layer in the order in which the pattern is expected to lose least, by W²·E[x²].

        Returns:
            (columns,) int64, for what else is known of the inputs.
        """
        channels = self.channels[layer.name]
        worth = channels.by_unit(layer.weight.float().square() * moments.mean_square())
        if channels.units * channels.copies > 1 and channels.width % sparsity.group:  # groups reach from one unit into another
            orders = torch.arange(channels.width, device=worth.device).repeat(channels.units, 1)
        else:
            orders = torch.stack([channel_order(of_unit, sparsity) for of_unit in worth])
        columns = channels.columns(orders)
        layer.set_weight(layer.weight[:, columns])
        self.waiting[layer.name] = orders.cpu()
        return columns

    def order_makers(self, orders: Mapping[str, Tensor]) -> None:
        """Put the outputs of the layers that make the inputs in the same order."""
        for name, of_units in orders.items():
            for maker in self.makers(name):
                layer = self.layers[maker]
                rows = self.channels[name].rows(of_units.to(layer.weight.device))
                layer.set_weight(layer.weight[rows])
                if layer.module.bias is not None:
                    layer.module.bias.data.copy_(layer.module.bias.data[rows])
        self.waiting = {}
