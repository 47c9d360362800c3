"""Settings of layer pruning: the groups sparsity, allocation, method, reorder, engine, refine and target."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from ..engine import (
    METHODS,
    Allocation,
    Method,
    Ordering,
    Precision,
    Refine,
    SemiStructured,
    Sparsity,
    Target,
    Unstructured,
)
from ..engine.groups import Saliency, Structured
from ..engine.kernels.backends import Backend
from ..engine.ordering import Direction
from ..engine.scores import SCORES
from ..runtime.errors import suggest
from .compatibility import STRUCTURED
from .section import Count, Positive, Section

DENSE = "dense"


class SparsitySettings(Section):
    pattern: str  # unstructured, or N:M, which prunes N of every M consecutive weights of a row
    ratio: Annotated[float, Field(ge=0, le=1)] | None = None  # unstructured and structured only
    heads: bool = True  # structured: remove attention heads
    neurons: bool = True  # structured: remove FFN neurons
    saliency: Saliency = "diagonal"  # structured, see rose_exp.engine.Structured
    at_once: Positive = 64  # structured: neurons to remove between updates of the inverse Hessian

    def problems(self, where: str) -> list[str]:
        if self.pattern in ("unstructured", STRUCTURED):
            if self.ratio is None:
                return [f"{where}.ratio: expected a number from 0 to 1, got null"]
            try:
                self.build()
            except ValueError as error:
                return [f"{where}.{error}"]
            return []
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not found:
            hint = suggest(self.pattern, ["unstructured", STRUCTURED, "2:4", "4:8"])
            expected = "'unstructured', 'structured' or 'N:M' such as 2:4"
            return [f"{where}.pattern: expected {expected}, got {self.pattern!r}{hint}"]
        pruned, group = int(found[1]), int(found[2])
        if group < 1 or pruned > group:
            return [f"{where}.pattern: expected N:M with N at most M and M at least 1, got {self.pattern!r}"]
        if self.ratio is not None and not math.isclose(self.ratio, pruned / group):
            expected = f"null or {pruned / group:g}, the ratio of pattern {self.pattern}"
            return [f"{where}.ratio: expected {expected}, got {self.ratio:g}"]
        return []

    def build(self) -> Sparsity | Structured:
        if self.pattern == "unstructured":
            return Unstructured(self.ratio)
        if self.pattern == STRUCTURED:
            return Structured(self.ratio, self.heads, self.neurons, self.saliency, self.at_once)
        return SemiStructured(*map(int, self.pattern.split(":")))


class MethodSettings(Section):
    name: str
    options: dict[str, Any] = Field({})  # the method's options for all layers
    layer_options: dict[str, dict[str, Any]] = Field({})  # overrides of options for layers whose full names match a pattern

    def problems(self, where: str) -> list[str]:
        known = [DENSE, *METHODS]
        if self.name not in known:
            return [f"{where}.name: expected one of {', '.join(known)}, got {self.name!r}{suggest(self.name, known)}"]
        found = []
        for place, options in [
            ("options", self.options),
            *((f"layer_options.{p}", o) for p, o in self.layer_options.items()),
        ]:
            found += self._option_problems(f"{where}.{place}", options)
        return found

    def _option_problems(self, where: str, options: dict[str, Any]) -> list[str]:
        if self.name == DENSE:
            return [f"{where}: expected none for {DENSE}, got {', '.join(options)}"] if options else []
        known = [field.name for field in dataclasses.fields(METHODS[self.name])]
        unknown = [name for name in options if name not in known]
        if unknown:
            expected = f"one of {', '.join(known)}" if known else f"none, because {self.name} has no options"
            return [f"{where}.{name}: expected {expected}{suggest(name, known)}" for name in unknown]
        try:
            METHODS[self.name](**options)
        except (TypeError, ValueError) as error:
            return [f"{where}.{error}"]
        return []

    def build(self, patterns: tuple[str, ...] = ()) -> Method:
        """Return the method with its options, overridden by the ``layer_options`` of ``patterns``."""
        options = dict(self.options)
        for pattern in patterns:
            options |= self.layer_options[pattern]
        return METHODS[self.name](**options)


class ReorderSettings(Section):
    """See :class:`rose_exp.engine.Ordering`."""

    columns: Direction = "none"
    blocks: Direction = "none"
    threshold: Annotated[float, Field(ge=0, le=1)] | None = 0.5  # null: reorder every layer
    score: str = "wanda"

    def problems(self, where: str) -> list[str]:
        if self.score in SCORES:
            return []
        return [f"{where}.score: expected one of {', '.join(SCORES)}, got {self.score!r}{suggest(self.score, SCORES)}"]

    def build(self) -> Ordering | None:
        if self.columns == "none" and self.blocks == "none":
            return None
        return Ordering(self.columns, self.blocks, self.threshold, self.score)


class EngineSettings(Section):
    """See :func:`rose_exp.engine.prune_layer`."""

    block_size: Positive = 128
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    backend: Backend = "auto"
    precision: Precision = "float32"  # of matrix products in the Hessian, see InputMoments
    permute: bool = False  # N:M: permute input channels to minimize the pattern's loss, where this has no cost at inference


class AllocationSettings(Section):
    """See :class:`rose_exp.engine.Allocation`."""

    rule: Literal["uniform", "owl", "losses"] = "uniform"  # uniform: the same sparsity in every layer
    spread: Annotated[float, Field(ge=0, le=1)] = 0.08
    outlier: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0

    def build(self) -> Allocation | None:
        return None if self.rule == "uniform" else Allocation(**self.model_dump())


class RefineSettings(Section):
    """See :class:`rose_exp.engine.Refine`."""

    steps: Count = 0
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    mask_iterations: Count = 0
    penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    growth: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    every: Positive = 4
    relaxation: Annotated[float, Field(ge=1, lt=2)] = 1.6

    def build(self) -> Refine:
        return Refine(**self.model_dump())


class TargetSettings(Section):
    """See :class:`rose_exp.engine.Target`."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    residual: Annotated[float, Field(ge=0, le=1)] = 0.0
    damping: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    def build(self) -> Target | None:
        """Return the regression target, or None if it is the dense layer's output."""
        return Target(**self.model_dump()) or None
