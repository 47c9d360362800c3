"""Mixtures of experts: access to experts that transformers stacks in three-dimensional parameters, and their routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


class Projection(nn.Module):
    """One expert's part of a stacked parameter, as a linear layer that accepts hooks.

    It has no parameters: ``weight`` is a view, (rows, columns), of the current stack.
    """

    def __init__(self, owner: nn.Module, parameter: str, expert: int, rows: slice):
        super().__init__()
        self.__dict__["owner"] = owner  # bypass registration as a submodule: the owner is the parent
        self.parameter, self.expert, self.rows = parameter, expert, rows

    @property
    def weight(self) -> Tensor:
        return self.owner._parameters[self.parameter][self.expert, self.rows]

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight)


def projections(module: nn.Module) -> list[dict[str, Projection]]:
    """Return the layers of each expert in a stack, by the names used for unstacked experts.

    The list is empty unless ``module`` is a stack in a known layout: (experts, rows, columns), gate before up, no biases.
    """
    kept = module.__dict__.get("_projections")
    if kept is None:
        kept = module.__dict__["_projections"] = _find(module)
    return kept


def _find(module: nn.Module) -> list[dict[str, Projection]]:
    stacks = {name: value for name, value in module._parameters.items() if value is not None}
    gated = "gate_up_proj" in stacks
    if set(stacks) != {"gate_up_proj" if gated else "up_proj", "down_proj"} or any(v.ndim != 3 for v in stacks.values()):
        return []
    changed = getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True)
    activation = getattr(type(module), "_apply_gate", None)
    if changed or not hasattr(module, "act_fn") or (activation is not None and activation.__name__ != "_default_apply_gate"):
        return []
    experts, rows, columns = stacks["gate_up_proj" if gated else "up_proj"].shape
    inner = rows // 2 if gated else rows
    if stacks["down_proj"].shape != (experts, columns, inner):
        return []
    projections_of = []
    for expert in range(experts):
        parts = {"gate_proj": ("gate_up_proj", slice(0, inner)), "up_proj": ("gate_up_proj", slice(inner, rows))}
        parts = parts if gated else {"up_proj": ("up_proj", slice(0, rows))}
        parts["down_proj"] = ("down_proj", slice(0, columns))
        projections_of.append({name: Projection(module, stack, expert, part) for name, (stack, part) in parts.items()})
    return projections_of


@contextmanager
def unstacked_experts(block: nn.Module) -> Iterator[None]:
    """Run the stacked experts inside ``block`` one after another through their own layers.

    Every layer is called, even if no token is routed to it.
    """
    stacks = [module for module in block.modules() if projections(module)]
    try:
        for module in stacks:
            module.__dict__["forward"] = _forward(module)
        yield
    finally:
        for module in stacks:
            module.__dict__.pop("forward", None)


def _forward(module: nn.Module):
    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, columns); top_k_index, top_k_weights (tokens, experts per token)."""
        output = torch.zeros_like(hidden_states)
        for expert, layers in enumerate(projections(module)):
            token, place = torch.where(top_k_index == expert)
            inputs = hidden_states[token]
            if "gate_proj" in layers:
                inner = module.act_fn(layers["gate_proj"](inputs)) * layers["up_proj"](inputs)
            else:
                inner = module.act_fn(layers["up_proj"](inputs))
            answer = layers["down_proj"](inner) * top_k_weights[token, place, None]
            output.index_add_(0, token, answer.to(output.dtype))
        return output

    return forward


def routers(block: nn.Module) -> set[nn.Module]:
    """Return the linear layers that route to experts or gate a shared expert.

    These are siblings of the experts with one output per expert, or a single output.
    """
    router_modules: set[nn.Module] = set()
    for module in block.modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        count = len(experts) if isinstance(experts, nn.ModuleList) else len(projections(experts))
        siblings = [child for child in module.children() if isinstance(child, nn.Linear)]
        router_modules |= {child for child in siblings if child.out_features in (count, 1)}
    return router_modules
