"""The pruning plan for the layers of a model, and the report of each pruned layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from ..engine import (
    Drift,
    InputMoments,
    Magnitude,
    Method,
    NotPositiveDefiniteError,
    Ordering,
    Precision,
    PruneResult,
    Refine,
    SemiStructured,
    Sparsity,
    Target,
    Unstructured,
    prune_layers,
)
from ..engine.allocation import Allocation
from ..engine.kernels.backends import Backend
from ..models import BlockList, LinearLayer, all_linear_layers, projections
from ..runtime.errors import RoseExpError, suggest
from .activations import Place

StarvedExperts = Literal["dense", "magnitude", "stop"]
Counts = tuple[int, int]  # (numbers that need not be stored, number of weights)

ROUNDED = 0.1  # fraction of the requested sparsity that may be lost to rounding down
FEW_ZEROS = 0.01  # fraction of zeros beyond the requested sparsity that a dense layer may contain
TINY = 1e-9  # floating-point tolerance when comparing these fractions


@dataclass(frozen=True)
class PruningPlan:
    """How to prune each layer of a model.

    Attributes:
        method: pruning method for layers that match no pattern in ``methods``.
        methods: pruning methods by pattern of full layer names; the first matching pattern wins.
        layers, skip: patterns of full layer names to prune, and of layers to exclude from them.
        true_sequential: whether to prune the layers of a block group by group in call order, and to calibrate each group on
            the outputs of the groups already pruned.
        refine: post-pruning refinement of every layer.
        allocation: sparsity allocation across layers; None prunes all layers to the same sparsity.
        shares: sparsity of each layer that the allocation chose after surveying the model.
        permute: for N:M patterns, whether to reorder the input channels of a layer to minimize the pattern's loss. This
            applies to layers whose inputs come from layers that can be reordered in the same way.
        target: regression target of the layers; None for the dense layer. With a target, the hidden states of the dense
            model are kept alongside those of the pruned model. Experts always use the dense layer, because the two models
            route different tokens to them.
        precision: precision of the matrix products that accumulate moments.
        batch: number of windows per forward pass of a block.
        activations: where the hidden states of all windows are stored between blocks.
        blocks: name of the list of blocks; None detects it from the model's structure.
        study: patterns of full layer names to study before pruning, see :func:`rose_exp.engine.study.study_layer`.
        expert_tokens: minimum number of calibration tokens for an expert; an expert with fewer is starved.
        starved_experts: how to handle a starved expert: leave it dense, prune it by magnitude, or stop the run.
    """

    method: Method
    sparsity: Sparsity
    ordering: Ordering | None = None
    methods: Mapping[str, Method] = field(default_factory=dict)
    block_size: int = 128
    damping: float = 0.01
    refine: Refine = field(default_factory=lambda: Refine(0))
    target: Target | None = None
    allocation: Allocation | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    permute: bool = False
    backend: Backend = "auto"
    precision: Precision = "float32"
    layers: Sequence[str] = ("*",)
    skip: Sequence[str] = ()
    true_sequential: bool = False
    batch: int = 4
    activations: Place = "device"
    blocks: str | None = None
    study: Sequence[str] = ()
    expert_tokens: int = 1
    starved_experts: StarvedExperts = "dense"

    def wants(self, name: str) -> bool:
        return chosen(name, self.layers, self.skip)

    @property
    def permutes(self) -> bool:
        return self.permute and isinstance(self.sparsity, SemiStructured)

    def solve(
        self, layers: Sequence[LinearLayer], moments: InputMoments, drift: Drift | None = None, by_magnitude: bool = False
    ) -> list[PruneResult]:
        """Prune layers that share their inputs, and update their weights in place.

        Args:
            drift: cross moments of the dense and the pruned model's inputs, if the plan's regression target applies.
            by_magnitude: whether to prune by magnitude instead of the plan's method.
        Raises:
            RoseExpError: the layers cannot be pruned; the message names them.
        """
        try:
            results = prune_layers(
                [layer.weight for layer in layers],
                moments,
                methods=[Magnitude() if by_magnitude else self.method_for(layer.name) for layer in layers],
                sparsity=[self.sparsity_of(layer.name) for layer in layers],
                ordering=self.ordering,
                block_size=self.block_size,
                damping=self.damping,
                refine=self.refine,
                backend=self.backend,
                drift=drift,
                target=self.target if drift is not None else None,
            )
        except (ValueError, NotPositiveDefiniteError) as error:
            raise RoseExpError(f"{', '.join(layer.name for layer in layers)}: {error}") from error
        for layer, result in zip(layers, results, strict=True):
            layer.set_weight(result.weight)
        return results

    def sparsity_of(self, name: str) -> Sparsity:
        return Unstructured(self.shares[name]) if name in self.shares else self.sparsity

    def method_for(self, name: str) -> Method:
        return next((method for pattern, method in self.methods.items() if fnmatchcase(name, pattern)), self.method)


@dataclass(frozen=True)
class LayerReport:
    """The run record's entry for one pruned layer.

    Attributes:
        sparsity: measured fraction of zeros. If a low-rank matrix of ``rank`` above 0 is added (OATS), the fraction of
            numbers saved by storing both parts.
        seconds: time spent solving, without the forward passes. Layers with the same input are solved together; the time
            is divided among them in proportion to their rows.
        dead_columns: number of dead input channels (always zero on the calibration data).
        instead: fallback of an expert with too few tokens: ``dense`` or ``magnitude``.
        target_error: error relative to the layer's regression target.
        unrefined_error: ``target_error`` before refinement.
        rechosen: number of weights that refinement pruned and that were not pruned before.
        unrefined: whether refinement was rejected because it would have increased the error.
        target: the regression target: ``dense`` for the dense layer, ``outputs`` for the dense model's output, or
            ``hidden_states`` for that output plus the residual of the hidden states.
        permuted: whether the order of the input channels differs from the dense model.
        removed, groups: number of removed heads or neurons, and their number before pruning.
        requested: sparsity that the plan requests for the layer; None if it leaves the layer dense.
    """

    name: str
    rows: int
    columns: int
    tokens: int
    sparsity: float
    error: float
    relative_range: float
    reordered: bool
    damping: float
    rank: int
    seconds: float
    dead_columns: int = 0
    instead: str | None = None
    target_error: float = 0.0
    unrefined_error: float = 0.0
    rechosen: int = 0
    unrefined: bool = False
    target: str = "dense"
    permuted: bool = False
    removed: int = 0
    groups: int = 0
    requested: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def saved_numbers(results: Sequence[PruneResult]) -> list[int]:
    """Return, for each pruned layer, how many of its rows × columns numbers need not be stored.

    Reads all counts with a single device synchronization.
    """
    zeros = torch.stack([(result.weight == 0).sum() for result in results]).tolist()
    return [r.weight.numel() - r.stored if r.rank else count for r, count in zip(results, zeros, strict=True)]


def saved_and_total(
    layers: Sequence[LinearLayer], reports: Mapping[str, Mapping[str, Any]], loaded: AbstractContextManager | None = None
) -> Counts:
    """Return how many numbers of the layers need not be stored, and how many weights the layers have.

    Layers with a report use its sparsity, which also covers low-rank parts. For all others, zeros are counted.

    Args:
        reports: reports of pruned layers by name, as in the run record.
        loaded: context manager that brings the weights into memory, entered only if a layer has no report; None if they
            are already in memory.
    """
    dense = [layer for layer in layers if layer.name not in reports]
    saved = sum(round(reports[x.name]["sparsity"] * x.weight.numel()) for x in layers if x.name in reports)
    with loaded if dense and loaded is not None else nullcontext():
        saved += sum(int((layer.weight == 0).sum()) for layer in dense)
    return saved, sum(layer.weight.numel() for layer in layers)


def report_of(name: str, result: PruneResult, tokens: int, seconds: float, saved: int, **more: Any) -> LayerReport:
    """Build the report of a layer of which ``saved`` numbers need not be stored, see :func:`saved_numbers`."""
    rows, columns = result.weight.shape
    return LayerReport(
        name=name,
        rows=rows,
        columns=columns,
        tokens=tokens,
        sparsity=saved / (rows * columns),
        error=result.error,
        relative_range=result.relative_range,
        reordered=result.reordered,
        damping=result.damping,
        rank=result.rank,
        seconds=seconds,
        dead_columns=result.dead_columns,
        target_error=result.target_error,
        unrefined_error=result.unrefined_error,
        rechosen=result.rechosen,
        unrefined=result.unrefined,
        requested=result.requested,
        **more,
    )


@dataclass
class PassSeconds:
    """Time in seconds by kind of work.

    With several processes, waiting for the slowest one counts as solving.

    Attributes:
        calibrating: forward passes of dense blocks, without the matrix products of the moments.
        moments: matrix products of the moments during these passes.
        studying: layer studies.
        solving: pruning and refinement of layers.
        advancing: forward passes of pruned blocks.
        surveying: survey of the dense model for sparsity allocation.
        shared: time an earlier run spent on the first block's moments that this run reuses; not part of this run's time.
    """

    calibrating: float = 0.0
    moments: float = 0.0
    studying: float = 0.0
    solving: float = 0.0
    advancing: float = 0.0
    surveying: float = 0.0
    shared: float = 0.0


def events(report: LayerReport, damping: float, block_size: int = 128) -> list[dict[str, Any]]:
    """Return the warnings for a layer, each with ``kind``, ``layer`` and ``detail``, for the run record.

    Args:
        damping, block_size: values of the plan.
    """
    found = []
    if report.instead is not None:
        found.append(("starved_expert", f"{report.tokens} tokens were routed to it: {report.instead}"))
    elif report.tokens < report.columns:
        found.append(("rank_deficient", f"{report.tokens} tokens for a Hessian of {report.columns} columns"))
    if report.dead_columns:
        found.append(("dead_columns", f"{report.dead_columns} of {report.columns} inputs are always zero"))
    if report.unrefined:
        found.append(("not_refined", f"refinement would have raised its error of {report.unrefined_error:.3g}"))
    if report.damping > damping:
        found.append(("damping_raised", f"from {damping:g} to {report.damping:g}"))
    if differs := _sparsity_differs(report, block_size):
        found.append(("sparsity_differs", differs))
    return [{"kind": kind, "layer": report.name, "detail": detail} for kind, detail in found]


def _sparsity_differs(report: LayerReport, block_size: int) -> str | None:
    """Describe how a layer's sparsity differs from the requested sparsity; return None if rounding explains it.

    Patterns round the number of pruned weights down in every row, block or group of columns that they compare. Rounding
    accounts for less than one weight in each, and is accepted up to a tenth of the requested sparsity: a pattern such as
    2:128 prunes nothing in a row of 63 weights. A low-rank part with one rank less (OATS) and a few zeros in the dense layer
    are accepted, too. Structured sparsity rounds to the nearest number of groups and keeps at least one.
    """
    requested, columns = report.requested, report.columns
    if requested is None:
        return None
    if report.groups:
        reached, explained = report.removed / report.groups, 0.5 / report.groups
        fewer, more = (explained if report.removed else 0.0), explained
    else:
        reached, blocks = report.sparsity, -(-columns // block_size)
        fewer = min(max(report.rows, blocks) / (report.rows * columns), requested * ROUNDED)
        more = FEW_ZEROS + (1 / report.rows + 1 / columns if report.rank else 0.0)
    if requested - fewer - TINY <= reached <= requested + more + TINY:
        return None
    low_rank = f"; a matrix of rank {report.rank} is added" if report.rank else ""
    return f"requested {requested:.4g}, reached {reached:.4g}{low_rank}"


def check_plan(blocks: BlockList, plan: PruningPlan) -> None:
    """Check the plan's patterns against the model's layers.

    Raises:
        RoseExpError: a pattern matches no layer, no layer is left to prune, or a weight to prune is not a linear layer.
    """
    names = [layer.name for layer in all_linear_layers(blocks)]
    check_patterns("pipeline.layers", plan.layers, names)
    check_patterns("pipeline.skip", plan.skip, names)
    wanted = [name for name in names if plan.wants(name)]
    if not wanted:
        raise RoseExpError("pipeline.layers, pipeline.skip: expected at least one layer to prune, got none")
    check_patterns("figures.study", plan.study, wanted)
    for index, block in enumerate(blocks.blocks):
        known = {id(parameter) for module in block.modules() if projections(module) for parameter in module.parameters(False)}
        for name, parameter in block.named_parameters():
            full = f"{blocks.block_name(index)}.{name}"
            if parameter.ndim > 2 and id(parameter) not in known and plan.wants(full):
                raise RoseExpError(
                    f"{full} of shape {tuple(parameter.shape)} is neither a linear layer nor a stack of experts in a known "
                    f"layout, so it cannot be pruned; add it to pipeline.skip to leave it dense"
                )


def check_patterns(setting: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every pattern matches at least one layer name.

    Raises:
        RoseExpError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            expected = f"a pattern of layer names such as {names[0]!r}"
            raise RoseExpError(f"{setting}: expected {expected}, got {pattern!r}, which matches none{suggest(pattern, names)}")


def chosen(name: str, layers: Sequence[str], skip: Sequence[str]) -> bool:
    """Return whether a full layer name matches a pattern in ``layers`` and none in ``skip``."""
    return any(fnmatchcase(name, p) for p in layers) and not any(fnmatchcase(name, p) for p in skip)
