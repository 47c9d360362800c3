"""Attention heads and FFN neurons: the rows that produce them, the columns that read them, and their removal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..runtime.errors import RoseExpError
from .blocks import LinearLayer
from .families import families

MAKERS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "q_proj", "k_proj", "v_proj")
OF_KEYS = ("to_k", "to_v", "add_k_proj", "add_v_proj", "k_proj", "v_proj")  # makers with one head per group of query heads

NORMS_OF_INPUTS = ("group_norm", "spatial_norm", "norm_cross")  # normalize the inputs of an attention


@dataclass(frozen=True)
class Part:
    """The rows or columns of a layer that belong to each group.

    Attributes:
        places: (groups, width) int64, rows of a layer that produces the groups or columns of a layer that reads them.
    """

    layer: LinearLayer
    places: Tensor


@dataclass(frozen=True)
class Structure:
    """The groups of a module: the heads of an attention or the neurons of an FFN.

    Query heads that share a key and value head form one group.

    Attributes:
        name: full name of the module in the model.
        owner: the module, which may store its number of heads.
        consumers: layers that read the groups: one, or two for joint attention.
        makers: layers whose rows produce the groups.
    """

    name: str
    kind: Literal["heads", "neurons"]
    owner: nn.Module
    consumers: tuple[Part, ...]
    makers: tuple[Part, ...]

    @property
    def groups(self) -> int:
        return len(self.consumers[0].places)

    @property
    def parameters(self) -> int:
        """Number of parameters that belong to each group."""
        read = sum(len(part.layer.module.weight) * part.places.shape[1] for part in self.consumers)
        made = sum(part.places.shape[1] * (part.layer.columns + (part.layer.module.bias is not None)) for part in self.makers)
        return read + made

    @torch.no_grad()
    def mask(self, removed: Tensor) -> None:
        """Zero all weights and biases that belong to the groups ``removed``, (groups,) bool."""
        for part in self.consumers:
            part.layer.module.weight[:, part.places[removed].flatten()] = 0
        for part in self.makers:
            rows = part.places[removed].flatten()
            part.layer.module.weight[rows] = 0
            if part.layer.module.bias is not None:
                part.layer.module.bias[rows] = 0

    def masked(self) -> Tensor:
        """Return which groups are masked, that is, have only zero columns in all consumers, (groups,) bool."""
        zero = torch.ones(self.groups, dtype=torch.bool)
        for part in self.consumers:
            zero_columns = (part.layer.weight == 0).all(dim=0).cpu()
            zero &= zero_columns[part.places].all(dim=1)
        return zero

    def makers_norm(self) -> Tensor:
        """Return the L1 norm of the weights and biases that produce each group, (groups,)."""
        total = torch.zeros(self.groups, device=self.consumers[0].layer.weight.device)
        for part in self.makers:
            rows = part.layer.weight.abs().sum(dim=1, dtype=torch.float32)
            if part.layer.module.bias is not None:
                rows = rows + part.layer.module.bias.detach().abs().float()
            total += rows[part.places.to(rows.device)].sum(dim=1)
        return total

    def remove_masked(self, count: int) -> None:
        """Shrink the layers by ``count`` masked groups, without changing any output.

        Raises:
            ValueError: fewer groups are masked.
        """
        masked = self.masked().nonzero().flatten()
        if len(masked) < count:
            raise ValueError(f"{self.name}: expected at least {count} masked {self.kind}, got {len(masked)}")
        kept = torch.ones(self.groups, dtype=torch.bool)
        kept[masked[:count]] = False
        self.keep(kept)

    def keep(self, kept: Tensor) -> None:
        """Shrink the layers to the groups ``kept``, (groups,) bool.

        Call :func:`find_structures` again before using other structures of the same layers.
        """
        before, after = self.groups, int(kept.sum())
        for part in self.consumers:
            remaining = torch.ones(part.layer.columns, dtype=torch.bool)
            remaining[part.places[~kept].flatten()] = False
            _narrow(part.layer.module, 1, remaining)
        for part in self.makers:
            remaining = torch.ones(part.layer.module.out_features, dtype=torch.bool)
            remaining[part.places[~kept].flatten()] = False
            _narrow(part.layer.module, 0, remaining)
        if self.kind == "heads":
            for name in ("heads", "num_heads", "num_key_value_heads", "inner_dim", "inner_kv_dim", "sliceable_head_dim"):
                value = vars(self.owner).get(name)
                if isinstance(value, int):
                    setattr(self.owner, name, value * after // before)


def _narrow(layer: nn.Linear, dim: int, remaining: Tensor) -> None:
    weight = layer.weight.detach()
    places = remaining.nonzero().flatten().to(weight.device)
    layer.weight = nn.Parameter(weight.index_select(dim, places), requires_grad=layer.weight.requires_grad)
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[places], requires_grad=layer.bias.requires_grad)
    layer.out_features, layer.in_features = layer.weight.shape


def find_structures(module: nn.Module, name: str = "", kinds: Collection[str] = ("heads", "neurons")) -> list[Structure]:
    """Find the heads and neurons of all attentions and FFNs in a module, in module order.

    Supports attentions with ``to_q`` … ``to_out`` (diffusers) or ``q_proj`` … ``o_proj`` (transformers), Flux's single blocks,
    FFNs with ``net`` (diffusers) or ``up_proj`` and ``down_proj``, gated or not, and the structures of model families.

    Args:
        name: full name of the module in the model.
    Raises:
        RoseExpError: the heads of an attention cannot be identified.
    """
    return list(_iterate(module, name, kinds))


def _iterate(module: nn.Module, name: str, kinds: Collection[str]) -> Iterator[Structure]:
    for inner, part in module.named_modules():
        full = ".".join(text for text in (name, inner) if text)
        own = [s for family in families() if family.structures is not None for s in family.structures(part, full)]
        if own:
            yield from (structure for structure in own if structure.kind in kinds)
            continue
        layers = {
            child: LinearLayer(f"{full}.{child}" if full else child, layer)
            for child, layer in part.named_modules()
            if isinstance(layer, nn.Linear)
        }
        single = {"proj_mlp", "proj_out", "attn.to_q"} <= set(layers)  # Flux: one layer reads heads and neurons
        if single:
            head_columns = layers["attn.to_q"].module.out_features
            if "heads" in kinds:
                inside = {key.removeprefix("attn."): layer for key, layer in layers.items()}
                yield _heads(full, part.attn, inside, [layers["proj_out"]], layers["proj_mlp"].module.out_features)
            if "neurons" in kinds:
                yield _neurons(full, part, layers["proj_mlp"], layers["proj_out"], head_columns)
        elif "to_q" in layers or {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(layers):
            consumers = [layers[key] for key in ("to_out.0", "to_add_out", "o_proj") if key in layers]
            if consumers and "heads" in kinds:
                yield _heads(full, part, layers, consumers)
        elif "neurons" not in kinds:
            continue
        elif {"net.0.proj", "net.2"} <= set(layers):
            yield _neurons(full, part, layers["net.0.proj"], layers["net.2"])
        elif {"up_proj", "down_proj"} <= set(layers):
            maker_layers = [layers[key] for key in ("gate_proj", "up_proj") if key in layers]
            places = torch.arange(layers["down_proj"].columns)[:, None]
            makers = tuple(Part(layer, places) for layer in maker_layers)
            yield Structure(full, "neurons", part, (Part(layers["down_proj"], places),), makers)


def _heads(
    name: str, owner: nn.Module, layers: dict[str, LinearLayer], consumers: Sequence[LinearLayer], extra_columns: int = 0
) -> Structure:
    """Return the heads of an attention; ``extra_columns`` is the number of the consumers' columns after those of the heads."""
    query = layers["to_q" if "to_q" in layers else "q_proj"].module
    keys = layers["to_k" if "to_k" in layers else "k_proj"].module
    if isinstance(getattr(owner, "heads", None), int):
        width = query.out_features // owner.heads
    else:
        width = getattr(owner, "head_dim", None)
    known = isinstance(width, int) and not query.out_features % width and not keys.out_features % width
    head_parameters = [name for name, _ in owner.named_parameters(recurse=False)]  # such as attention sinks
    if not known or head_parameters or any(layer.columns != query.out_features + extra_columns for layer in consumers):
        raise RoseExpError(f"sparsity.heads: expected a known layout of heads in {name}, got another, so none can be removed")
    groups = keys.out_features // width
    shared = query.out_features // keys.out_features * width
    for inner, part in owner.named_modules():
        if isinstance(part, nn.Linear) or "norm" not in inner or inner in NORMS_OF_INPUTS or query.out_features == width:
            continue
        if any(parameter.numel() == query.out_features for parameter in part.parameters(recurse=False)):
            raise RoseExpError(f"sparsity.heads: {name}.{inner} normalizes over all heads, so none can be removed")
    query_places = torch.arange(groups * shared).view(groups, shared)
    key_places = torch.arange(groups * width).view(groups, width)
    makers = [Part(layers[k], key_places if k in OF_KEYS else query_places) for k in MAKERS if k in layers]
    return Structure(name, "heads", owner, tuple(Part(layer, query_places) for layer in consumers), tuple(makers))


def _neurons(name: str, owner: nn.Module, maker: LinearLayer, consumer: LinearLayer, head_columns: int = 0) -> Structure:
    neurons, rows = consumer.columns - head_columns, maker.module.out_features
    if rows not in (neurons, 2 * neurons):
        raise RoseExpError(f"sparsity.neurons: {maker.name} has {rows} rows for {neurons} inputs of {consumer.name}: unknown")
    places = torch.arange(neurons)[:, None]
    makers = (Part(maker, places if rows == neurons else torch.cat([places, places + neurons], dim=1)),)  # gated: value, gate
    return Structure(name, "neurons", owner, (Part(consumer, places + head_columns),), makers)
