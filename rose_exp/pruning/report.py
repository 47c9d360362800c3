"""The report of each pruned layer, its warnings, and how many numbers a pruned layer stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..engine import PruneResult
from ..models import LinearLayer

Counts = tuple[int, int]  # (numbers that need not be stored, number of weights)

ROUNDED = 0.1  # fraction of the requested sparsity that may be lost to rounding down
FEW_ZEROS = 0.01  # fraction of zeros beyond the requested sparsity that a dense layer may contain
TINY = 1e-9  # floating-point tolerance when comparing these fractions


@dataclass(frozen=True)
class LayerReport:
    """The run record's entry for one pruned layer.

    Attributes:
        sparsity: measured fraction of zeros. If a low-rank matrix of ``rank`` above 0 is added (OATS), the fraction of
            numbers saved by storing both parts.
        seconds: time spent solving, without the forward passes. Layers with the same input are solved together; the time
            is divided among them in proportion to their rows.
        dead_columns: number of dead input channels (always zero on the calibration data).
        fallback: treatment of an expert with too few tokens: ``dense`` or ``magnitude``.
        target_error: error relative to the layer's regression target.
        unrefined_error: ``target_error`` before refinement.
        mask_changes: number of weights that refinement pruned and that were not pruned before.
        refinement_rejected: whether refinement was rejected because it would have increased the error.
        target: the regression target: ``dense`` for the dense layer, ``asymmetric`` for the dense model's output, or
            ``residual`` for that output plus the residual of the hidden states.
        permuted: whether the order of the input channels differs from the dense model.
        removed: number of removed heads or neurons.
        groups: number of heads or neurons before pruning.
        requested: sparsity that the plan requests for the layer; None if it leaves the layer dense.
        reconstruction: error of the block's output on held-out windows after its reconstruction, relative to that before; None
            without reconstruction. The other errors are those before it.
        hessian_used: whether the result depends on the Hessian beyond its diagonal, see :class:`rose_exp.engine.PruneResult`.
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
    fallback: str | None = None
    target_error: float = 0.0
    unrefined_error: float = 0.0
    mask_changes: int = 0
    refinement_rejected: bool = False
    target: str = "dense"
    permuted: bool = False
    removed: int = 0
    groups: int = 0
    requested: float | None = None
    hessian_used: bool = True
    reconstruction: float | None = None

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
        mask_changes=result.mask_changes,
        refinement_rejected=result.refinement_rejected,
        requested=result.requested,
        hessian_used=result.hessian_used,
        **more,
    )


def events(report: LayerReport, damping: float, block_size: int = 128, studied: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the warnings for a layer, each with ``kind``, ``layer`` and ``detail``, for the run record.

    Args:
        damping, block_size: values of the plan.
        studied: patterns of the layers whose order is studied, for which the study uses the Hessian.
    """
    hessian_used = report.hessian_used or any(fnmatchcase(report.name, pattern) for pattern in studied)
    occurrences = []
    if report.fallback is not None:
        occurrences.append(("starved_expert", f"{report.tokens} tokens were routed to it: {report.fallback}"))
    elif hessian_used and report.tokens < report.columns:
        occurrences.append(("rank_deficient", f"{report.tokens} tokens for a Hessian of {report.columns} columns"))
    if report.dead_columns:
        occurrences.append(("dead_columns", f"{report.dead_columns} of {report.columns} inputs are always zero"))
    if report.refinement_rejected:
        occurrences.append(("refinement_rejected", f"refinement would have raised its error of {report.unrefined_error:.3g}"))
    if report.reconstruction is not None and report.reconstruction >= 1:
        occurrences.append(("reconstruction_without_gain", "it did not lower the error of the block on held-out windows"))
    if report.damping > damping:
        occurrences.append(("damping_raised", f"from {damping:g} to {report.damping:g}"))
    if differs := _sparsity_differs(report, block_size):
        occurrences.append(("sparsity_differs", differs))
    return [{"kind": kind, "layer": report.name, "detail": detail} for kind, detail in occurrences]


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
