"""Mixtures of experts: access to experts that transformers stacks in three-dimensional parameters, and their routers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.errors import RoseExpError
from .families import families

CLOSE = 1e-3  # relative tolerance for equal outputs of a stack and of its layers; at least four times the dtype's epsilon
DEFAULT = "_default_apply_gate"  # name of transformers' own activation of gated experts, act_fn(gate) · up


class Projection(nn.Module):
    """One expert's part of a stacked parameter, as a linear layer that accepts hooks.

    It has no parameters: ``weight`` is a view, (rows, columns), of the current stack.

    Args:
        owner: module with the stack.
        parameter: name of the stack, (experts, rows, columns), or (experts, columns, rows) if ``transposed``. Its bias, if any,
            is the parameter ``<name>_bias``, (experts, rows).
        rows: the rows of the stack that belong to the layer.
    """

    def __init__(self, owner: nn.Module, parameter: str, expert: int, rows: slice, transposed: bool = False):
        super().__init__()
        self.__dict__["owner"] = owner  # bypass registration as a submodule: the owner is the parent
        self.parameter, self.expert, self.rows, self.transposed = parameter, expert, rows, transposed

    @property
    def weight(self) -> Tensor:
        matrix = self.owner._parameters[self.parameter][self.expert]
        return (matrix.T if self.transposed else matrix)[self.rows]

    @property
    def bias(self) -> Tensor | None:
        stack = self.owner._parameters.get(f"{self.parameter}_bias")
        return None if stack is None else stack[self.expert, self.rows]

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight, self.bias)


Layers = dict[str, Projection]
"""The layers of one expert, by the names used for unstacked experts."""


class Layout(ABC):
    """How a module stores and runs its experts. The layouts of families and those in :data:`LAYOUTS` are tried in order."""

    @abstractmethod
    def layers(self, module: nn.Module) -> list[Layers]:
        """Return the layers of each expert; an empty list if the module has another layout."""

    @abstractmethod
    def forward(self, module: nn.Module, experts: Sequence[Layers], *arguments: Any) -> Tensor:
        """Run the experts one after another through their layers. Every layer is called, even without tokens."""


class Gated(Layout):
    """Experts with the parameters ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, as in transformers' experts interface.

    The stacks can be transposed, gate and up rows can alternate, and projections can have biases. The class can define its own
    activation, as gpt-oss does. Experts beyond those of ``down_proj`` return their inputs, as in LongCat.
    """

    def layers(self, module: nn.Module) -> list[Layers]:
        stacks = {name: value for name, value in module._parameters.items() if value is not None}
        upper = "gate_up_proj" if "gate_up_proj" in stacks else "up_proj"
        weights = {name: value for name, value in stacks.items() if not name.endswith("_bias")}
        if set(weights) != {upper, "down_proj"} or any(value.ndim != 3 for value in weights.values()):
            return []
        if not (hasattr(module, "act_fn") or hasattr(module, "_apply_gate")):
            return []
        count = len(weights["down_proj"])
        transposed = self._transposed(weights[upper], weights["down_proj"], 2 if upper == "gate_up_proj" else 1)
        if transposed is None or (count < len(weights[upper]) and not hasattr(module, "identity_expert")):
            return []
        rows, hidden = weights[upper].shape[1:][::-1] if transposed else weights[upper].shape[1:]
        parts = {"up_proj": (upper, slice(0, rows))}
        if upper == "gate_up_proj" and getattr(module, "is_concatenated", True):
            parts = {"gate_proj": (upper, slice(0, rows // 2)), "up_proj": (upper, slice(rows // 2, rows))}
        elif upper == "gate_up_proj":
            parts = {"gate_proj": (upper, slice(0, rows, 2)), "up_proj": (upper, slice(1, rows, 2))}
        parts["down_proj"] = ("down_proj", slice(0, hidden))
        return [
            {name: Projection(module, stack, expert, part, transposed) for name, (stack, part) in parts.items()}
            for expert in range(count)
        ]

    @staticmethod
    def _transposed(upper: Tensor, down: Tensor, factor: int) -> bool | None:
        """Return whether the stacks are transposed, according to their shapes; None if these do not fit each other.

        Args:
            factor: number of projections in ``upper``.
        """
        (_, first, second), (_, third, fourth) = upper.shape, down.shape
        if (first, second) == (factor * fourth, third):
            return False
        return True if (first, second) == (fourth, factor * third) else None

    def forward(self, module: nn.Module, experts: Sequence[Layers], *arguments: Any) -> Tensor:
        if len(arguments) == 1:
            return self._forward_sorted(module, experts, *arguments)
        hidden_states, top_k_index, top_k_weights = arguments  # (tokens, columns), twice (tokens, experts per token)
        output = torch.zeros_like(hidden_states)
        upper = module._parameters.get("gate_up_proj")
        for expert in range(len(experts) if upper is None else len(upper)):
            token, place = torch.where(top_k_index == expert)
            inputs = hidden_states[token]
            answer = self._run(module, experts[expert], inputs) if expert < len(experts) else module.identity_expert(inputs)
            answer = answer * top_k_weights[token, place, None]
            output.index_add_(0, token, answer.to(output.dtype))
        return output

    def _forward_sorted(self, module: nn.Module, experts: Sequence[Layers], hidden_states: Tensor) -> Tensor:
        """Run experts that each receive all tokens, with zeros in place of the tokens of others, as in Llama 4."""
        by_expert = hidden_states.view(len(experts), -1, hidden_states.shape[-1])
        outputs = torch.zeros_like(by_expert)
        for layers, inputs, output in zip(experts, by_expert, outputs, strict=True):
            routed = (inputs != 0).any(dim=-1)
            output[routed] = self._run(module, layers, inputs[routed])
        return outputs.view(-1, hidden_states.shape[-1])

    @staticmethod
    def _run(module: nn.Module, layers: Layers, inputs: Tensor) -> Tensor:
        if "gate_proj" not in layers:
            inner = module.act_fn(layers["up_proj"](inputs))
        elif getattr(getattr(module, "_apply_gate", None), "__name__", DEFAULT) != DEFAULT:  # an activation of its own
            pair = (layers["gate_proj"](inputs), layers["up_proj"](inputs))
            concatenated = getattr(module, "is_concatenated", True)
            inner = module._apply_gate(torch.cat(pair, -1) if concatenated else torch.stack(pair, -1).flatten(-2))
        else:
            inner = module.act_fn(layers["gate_proj"](inputs)) * layers["up_proj"](inputs)
        answer = layers["down_proj"](inner)
        return module.post_expert_norm(answer) if getattr(module, "has_post_expert_norm", False) else answer


class Parallel(Layout):
    """One linear layer for each expert, on tokens sorted by expert, as in JetMoE: ``weight`` and ``forward(inputs, sizes)``."""

    def layers(self, module: nn.Module) -> list[Layers]:
        stacks = [name for name, value in module._parameters.items() if value is not None]
        if stacks != ["weight"] or module.weight.ndim != 3 or not hasattr(module, "num_experts"):
            return []
        experts, rows, _ = module.weight.shape
        return [{"proj": Projection(module, "weight", expert, slice(0, rows))} for expert in range(experts)]

    def forward(self, module: nn.Module, experts: Sequence[Layers], *arguments: Any) -> Tensor:
        inputs, sizes = arguments
        parts = zip(experts, inputs.split(sizes, dim=0), strict=True)
        return torch.cat([layers["proj"](part) for layers, part in parts])


class Shared(Layout):
    """Gated experts that all process every token, as in Inkling: three stacks, and ``forward(hidden_states, gammas)``.

    The weights ``gammas``, (..., experts), scale the inputs of the ``down_proj`` layers.
    """

    def layers(self, module: nn.Module) -> list[Layers]:
        names = ("gate_proj", "up_proj", "down_proj")
        stacks = {name: value for name, value in module._parameters.items() if value is not None}
        if set(stacks) != set(names) or any(value.ndim != 3 for value in stacks.values()) or not hasattr(module, "act_fn"):
            return []
        experts = range(len(module.down_proj))
        return [
            {name: Projection(module, name, expert, slice(0, stacks[name].shape[1])) for name in names} for expert in experts
        ]

    def forward(self, module: nn.Module, experts: Sequence[Layers], *arguments: Any) -> Tensor:
        hidden_states, gammas = arguments
        inputs = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = torch.zeros(inputs.shape, dtype=torch.promote_types(inputs.dtype, torch.float32), device=inputs.device)
        for layers, gamma in zip(experts, gammas.reshape(len(inputs), -1).unbind(1), strict=True):
            inner = module.act_fn(layers["gate_proj"](inputs)) * layers["up_proj"](inputs) * gamma[:, None]
            output += layers["down_proj"](inner)
        return output.to(hidden_states.dtype).view(hidden_states.shape)


LAYOUTS: list[Layout] = [Gated(), Parallel(), Shared()]
"""The built-in layouts. Other packages add theirs through a :class:`rose_exp.models.families.Family`."""


def projections(module: nn.Module) -> list[Layers]:
    """Return the layers of each expert in a stack; an empty list unless ``module`` is a stack in a known layout."""
    return _found(module)[1]


def _found(module: nn.Module) -> tuple[Layout | None, list[Layers]]:
    """Return the layout of a module and its layers, which are kept with the module."""
    kept = module.__dict__.get("_projections")
    if kept is None:
        layouts = [*(layout for family in families() for layout in family.layouts), *LAYOUTS]
        candidates = ((layout, layout.layers(module)) for layout in layouts)
        kept = next(((layout, layers) for layout, layers in candidates if layers), (None, []))
        module.__dict__["_projections"] = kept
    return kept


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


def _forward(module: nn.Module) -> Callable[..., Tensor]:
    layout, experts = _found(module)

    def forward(*arguments: Any, **keywords: Any) -> Tensor:
        return layout.forward(module, experts, *arguments, *keywords.values())

    return forward


def check_layouts(block: nn.Module, name: str, run: Callable[[], Any]) -> None:
    """Check that the layers of each stack of experts inside ``block`` compute what the stack itself computes.

    A class can have the parameters of a known layout and use them in another way.

    Args:
        name: full name of the block in the model.
        run: runs the block on a few tokens.
    Raises:
        RoseExpError: the outputs of a stack and of its layers differ.
    """
    stacks = {inner: module for inner, module in block.named_modules() if projections(module)}
    if any(parameter.dtype == torch.float64 for module in stacks.values() for parameter in module.parameters()):
        return  # transformers' grouped products have no float64, so the stack itself cannot run
    calls: dict[nn.Module, tuple[tuple, dict[str, Any], Tensor]] = {}
    with ExitStack() as hooks:
        for module in stacks.values():
            hooks.callback(module.register_forward_hook(lambda m, *call: calls.update({m: call}), with_kwargs=True).remove)
        if stacks:
            run()
    for inner, module in stacks.items():
        if module not in calls:
            continue
        arguments, keywords, expected = calls[module]
        difference = (_forward(module)(*arguments, **keywords).float() - expected.float()).norm()
        limit = max(CLOSE, 4 * torch.finfo(expected.dtype).eps) * expected.float().norm()
        if torch.isfinite(expected).all() and not difference <= limit:
            raise RoseExpError(
                f"{name}.{inner}: expected experts whose layers compute what {type(module).__name__} computes, got outputs "
                f"that differ by {float(difference / expected.float().norm()):.2g}: its layout is not supported"
            )


def routers(block: nn.Module) -> set[nn.Module]:
    """Return the linear layers that route to experts or gate a shared expert.

    These are siblings of the experts with one output per expert, or a single output, or layers inside a sibling ``router``.
    """
    layers: set[nn.Module] = set()
    for module in block.modules():
        experts = getattr(module, "experts", None)
        stacks = [experts] if isinstance(experts, nn.Module) else [child for child in module.children() if projections(child)]
        if not stacks:
            continue
        counts = {len(stack) if isinstance(stack, nn.ModuleList) else len(projections(stack)) for stack in stacks} | {1}
        siblings = [child for child in module.children() if isinstance(child, nn.Linear)]
        siblings += list(module.router.modules()) if isinstance(getattr(module, "router", None), nn.Module) else []
        layers |= {child for child in siblings if isinstance(child, nn.Linear) and child.out_features in counts}
    return layers
