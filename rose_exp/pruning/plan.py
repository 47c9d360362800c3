"""What to do with each layer of a model, and what is told of it afterwards."""

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
Counts = tuple[int, int]  # numbers that need not be stored, and weights

ROUNDED = 0.1  # share of the requested sparsity that rounding down may take away
FEW_ZEROS = 0.01  # share of zeros beyond the requested sparsity that a dense layer may hold
TINY = 1e-9  # rounding of the shares themselves


@dataclass(frozen=True)
class PruningPlan:
    """What to do with each layer.

    Attributes:
        method: for all layers, or those of no pattern in ``methods``.
        methods: for layers whose full name matches a pattern; the first that matches counts.
        layers, skip: patterns of full layer names to prune, and of those to leave dense all the same.
        true_sequential: prune the layers of a block group by group, in the order that they are called, each group with
            moments of inputs that the groups before, already pruned, have made.
        refine: what is made better of every layer once it is pruned.
        allocation: how layers share what is pruned; None: all lose the same share.
        shares: what came out of that, by layer, once the model has been surveyed.
        permute: with N:M patterns, put a layer's input channels in the order in which the pattern loses least, where the layers
            that make them can be put in the same.
        target: what each layer is asked to be; None: the dense layer. With one, the dense model's hidden states are kept beside
            those of the pruned model. Experts are asked to be the dense layer all the same: other tokens reach them
            in the two models.
        precision: of the moments' products.
        batch: windows that run through a block at once.
        activations: where the hidden states of all windows are kept between blocks.
        blocks: name of the list of blocks; None: found by structure.
        study: patterns of full layer names to study before they are pruned, see :func:`rose_exp.engine.study.study_layer`.
        expert_tokens: an expert that fewer calibration tokens are routed to is starved.
        starved_experts: what becomes of it: it stays dense, is pruned by magnitude, or stops the run.
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
        """Prune layers that share their inputs, and set their weights.

        Args:
            drift: of their inputs, where they are asked for the plan's target.
            by_magnitude: whatever the plan's method is.
        Raises:
            RoseExpError: it cannot be done; the message names them.
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
    """One pruned layer, for the record.

    Attributes:
        sparsity: measured share of zeros; with a matrix of ``rank`` above 0 added (OATS), the share of numbers that storing
            both parts saves.
        seconds: for solving, without the passes through the block. Layers with the same input are solved together and share
            the time by their rows.
        dead_columns: number of dead input channels (always zero on the calibration data).
        instead: what became of an expert that saw too few tokens: ``dense`` or ``magnitude``.
        target_error: error relative to the layer's regression target.
        unrefined_error: the same before refinement.
        rechosen: number of weights that refinement pruned and that were not pruned before.
        unrefined: whether refinement would have raised the error, so that the layer is left as it was pruned.
        target: the regression target: ``dense``, the dense layer; ``outputs``, the dense model's output; ``hidden_states``,
            this and what the hidden states lack.
        permuted: whether the input channels stand in another order than in the dense model.
        removed, groups: number of heads or neurons removed as a whole, and how many there were.
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
    """Of each pruned layer, how many of its rows × columns numbers need not be stored; one wait for all."""
    zeros = torch.stack([(result.weight == 0).sum() for result in results]).tolist()
    return [r.weight.numel() - r.stored if r.rank else count for r, count in zip(results, zeros, strict=True)]


def saved_and_total(
    layers: Sequence[LinearLayer], reports: Mapping[str, Mapping[str, Any]], loaded: AbstractContextManager | None = None
) -> Counts:
    """How many numbers of some layers need not be stored, and how many weights the layers have.

    A reported layer counts by its report, which is right for layers with a low-rank part as well; others by their zeros.

    Args:
        reports: of pruned layers, as in the run record, by name.
        loaded: a context in which the weights of the layers are in memory, entered only if some have no report; None: they
            are in memory.
    """
    dense = [layer for layer in layers if layer.name not in reports]
    saved = sum(round(reports[x.name]["sparsity"] * x.weight.numel()) for x in layers if x.name in reports)
    with loaded if dense and loaded is not None else nullcontext():
        saved += sum(int((layer.weight == 0).sum()) for layer in dense)
    return saved, sum(layer.weight.numel() for layer in layers)


def report_of(name: str, result: PruneResult, tokens: int, seconds: float, saved: int, **more: Any) -> LayerReport:
    """The report of a result of which ``saved`` numbers need not be stored, see :func:`saved_numbers`."""
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
    """Where the time of a walk goes: the survey of the dense model, the dense passes, the moments' products in them, studies of
    layers, solving, and the passes of pruned blocks; ``shared`` is no time of this walk, but what an earlier one has spent on
    the first block's moments that this one was given. Processes that solve their layers at the same time wait for the slowest,
    which counts as solving."""

    calibrating: float = 0.0
    moments: float = 0.0
    studying: float = 0.0
    solving: float = 0.0
    advancing: float = 0.0
    surveying: float = 0.0
    shared: float = 0.0


def events(report: LayerReport, damping: float, block_size: int = 128) -> list[dict[str, Any]]:
    """Warnings for a layer, for the record: ``kind``, ``layer`` and ``detail``.

    Args:
        damping, block_size: those of the plan.
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
    """How the sparsity of a layer differs from the requested one, None if counting whole weights or groups explains it.

    Patterns round the number of pruned weights down in every row, block or group of columns that they compare. That explains
    less than one weight in each, and here no more than a tenth of what is requested: a pattern such as 2:128 loses nothing at
    all of a row of 63 weights. It also explains a low-rank part of one rank less (OATS), and zeros of the dense layer as far
    as they are few. Structured sparsity rounds to the nearest number of groups, of which one stays.
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
        RoseExpError: a pattern that matches no layer, nothing left to prune, or weights that are no linear layers.
    """
    names = [layer.name for layer in all_linear_layers(blocks)]
    check_patterns("pipeline.layers", plan.layers, names)
    check_patterns("pipeline.skip", plan.skip, names)
    wanted = [name for name in names if plan.wants(name)]
    if not wanted:
        raise RoseExpError("pipeline.layers, pipeline.skip: expected to leave a layer to prune, got none")
    check_patterns("figures.study", plan.study, wanted)
    for index, block in enumerate(blocks.blocks):
        known = {id(parameter) for module in block.modules() if projections(module) for parameter in module.parameters(False)}
        for name, parameter in block.named_parameters():
            full = f"{blocks.block_name(index)}.{name}"
            if parameter.ndim > 2 and id(parameter) not in known and plan.wants(full):
                raise RoseExpError(
                    f"{full} of shape {tuple(parameter.shape)} is no linear layer, nor experts stacked in a known layout, and "
                    f"cannot be pruned; name it in pipeline.skip to leave it dense"
                )


def check_patterns(setting: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every pattern matches a layer's name.

    Raises:
        RoseExpError: one does not.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            expected = f"a pattern of layer names such as {names[0]!r}"
            raise RoseExpError(f"{setting}: expected {expected}, got {pattern!r}, which matches none{suggest(pattern, names)}")


def chosen(name: str, layers: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether a layer of this full name matches a pattern of ``layers`` and none of ``skip``."""
    return any(fnmatchcase(name, p) for p in layers) and not any(fnmatchcase(name, p) for p in skip)
