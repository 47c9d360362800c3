"""Settings that select a sparsity pattern, a method and the layers to prune.

The other settings of pruning are the engine's own option classes, such as :class:`rose_exp.engine.Refine`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ..engine import METHODS, Method, Sparsity, Structured
from ..engine.bounds import Fraction, Positive
from ..engine.groups import GroupOptions
from ..engine.patterns import as_sparsity
from ..runtime.errors import suggest
from .compatibility import STRUCTURED
from .messages import explain
from .section import Section

DENSE = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsitySettings(GroupOptions):
    """A sparsity pattern. The fields of :class:`GroupOptions` concern structured sparsity only."""

    pattern: str  # unstructured, structured, or N:M, which prunes N of every M consecutive weights of a row
    ratio: Fraction | None = None  # unstructured and structured only; N:M patterns ignore it

    def problems(self, where: str) -> list[str]:
        if self.pattern in ("unstructured", STRUCTURED):
            if self.ratio is None:
                return [f"{where}.ratio: expected a number from 0 to 1, got null"]
            try:
                _ = self.parsed
            except ValueError as error:
                return [f"{where}.{error}"]
            return []
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not match:
            hint = suggest(self.pattern, ["unstructured", STRUCTURED, "2:4", "4:8"])
            expected = "'unstructured', 'structured' or 'N:M' such as 2:4"
            return [f"{where}.pattern: expected {expected}, got {self.pattern!r}{hint}"]
        pruned, group = int(match[1]), int(match[2])
        if group < 1 or pruned > group:
            return [f"{where}.pattern: expected N:M with N at most M and M at least 1, got {self.pattern!r}"]
        return []

    @property
    def semi_structured(self) -> bool:
        """Whether the pattern is N:M, which implies the ratio."""
        return self.pattern not in ("unstructured", STRUCTURED)

    def contradiction(self, where: str) -> str | None:
        """Return the error of a ratio that differs from that of an N:M pattern, or None.

        It is no error of the settings, because a sweep over patterns and ratios has such combinations. A run ignores the ratio.
        """
        if self.ratio is None or not self.semi_structured or math.isclose(self.ratio, self.parsed.ratio):
            return None
        expected = f"null or {self.parsed.ratio:g}, the ratio of pattern {self.pattern}"
        return f"{where}.ratio: expected {expected}, got {self.ratio:g}"

    @property
    def parsed(self) -> Sparsity | Structured:
        """The pattern as the engine's object."""
        if self.pattern == STRUCTURED:
            options = {field.name: getattr(self, field.name) for field in dataclasses.fields(GroupOptions)}
            return Structured(self.ratio, **options)
        return as_sparsity(self.ratio if self.pattern == "unstructured" else self.pattern)


class MethodSettings(Section):
    name: str
    options: dict[str, Any] = Field({})  # the method's options for all layers
    layer_options: dict[str, dict[str, Any]] = Field({})  # overrides of options for layers whose full names match a pattern

    def problems(self, where: str) -> list[str]:
        known = [DENSE, *METHODS]
        if self.name not in known:
            return [f"{where}.name: expected one of {', '.join(known)}, got {self.name!r}{suggest(self.name, known)}"]
        problems = []
        for part, options in [
            ("options", self.options),
            *((f"layer_options.{p}", o) for p, o in self.layer_options.items()),
        ]:
            problems += self._option_problems(f"{where}.{part}", options)
        return problems

    def _option_problems(self, where: str, options: dict[str, Any]) -> list[str]:
        if self.name == DENSE:
            return [f"{where}: expected none for {DENSE}, got {', '.join(options)}"] if options else []
        known = [field.name for field in dataclasses.fields(METHODS[self.name])]
        unknown = [name for name in options if name not in known]
        if unknown:
            expected = f"one of {', '.join(known)}" if known else f"none, because {self.name} has no options"
            return [f"{where}.{name}: expected {expected}{suggest(name, known)}" for name in unknown]
        try:
            _create(self.name, options)
        except ValidationError as error:
            return [f"{where}.{explain(problem, METHODS[self.name]).removeprefix('.')}" for problem in error.errors()]
        return []

    def create(self, patterns: tuple[str, ...] = ()) -> Method:
        """Return the method with its options, overridden by the ``layer_options`` of ``patterns``."""
        options = dict(self.options)
        for pattern in patterns:
            options |= self.layer_options[pattern]
        return _create(self.name, options)


def _create(name: str, options: Mapping[str, Any]) -> Method:
    """Return a method with the given options, converted to the types of its fields like the settings.

    Raises:
        ValidationError: an option has the wrong type or is outside its bounds.
    """
    return TypeAdapter(METHODS[name]).validate_python(dict(options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which layers of a model to prune, and how the model runs while they are calibrated.

    Args:
        layers, skip: patterns of the full names of the layers to prune, and of layers to leave dense.
        true_sequential: calibrate each group of layers in a block on inputs from the groups already pruned.
        permute: for N:M patterns, permute the input channels of a layer to minimize the pattern's loss. This applies to layers
            whose inputs come from layers that can be permuted in the same way, so it has no cost at inference.
        batch: batch size on a GPU in windows; a CPU always uses 1.
        activations: where to keep the hidden states of all windows between blocks.
        expert_tokens: minimum number of calibration tokens routed to an expert; below it, the expert counts as starved.
        starved_experts: treatment of starved experts: leave them dense, prune them by magnitude, or stop the run.
    """

    layers: list[str] = dataclasses.field(default_factory=lambda: ["*"])
    skip: list[str] = dataclasses.field(default_factory=list)
    true_sequential: bool = False
    permute: bool = False
    batch: Positive = 4
    activations: Literal["device", "host", "disk"] = "device"
    expert_tokens: Positive = 1
    starved_experts: Literal["dense", "magnitude", "stop"] = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineSettings(LayerOptions):
    weights: Literal["auto", "memory", "disk"] = "auto"  # memory: the whole model; disk: load one block at a time
    by_blocks: bool | Literal["auto"] = "auto"  # measure perplexity one block at a time; auto: only if necessary
    resume: Literal["activations", "recompute", "none"] = "activations"  # what an interrupted run resumes from

    def problems(self, where: str) -> list[str]:
        if self.weights == "disk" and self.resume == "none":
            return [f"{where}.resume: expected activations or recompute with weights=disk, which keeps pruned blocks, got none"]
        return []

    @property
    def layer_options(self) -> dict[str, Any]:
        """The fields of :class:`LayerOptions` by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(LayerOptions)}
