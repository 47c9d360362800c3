"""Run records to tables: methods × sparsities (or × any other setting), over paired seeds, one protocol a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.errors import RoseExpError
from ..settings.effects import flat, without
from ..tracking.record import REORDERED
from .cells import Cell, mark_best, paired_difference
from .conditions import SPARSITY, agree, column_of, conditions, differing, is_dense, variant
from .published import find

ALL = "all"  # the only column of tasks' tables, and where a dense model stands
MINUTES = "minutes.pruning"
DESCRIPTIVE = (MINUTES, REORDERED)  # metrics without differences to a baseline
JUDGED = ("perplexity.", "zero_shot", "images.", MINUTES)  # metrics of which there is a best
HIGHER = ("zero_shot", "images.psnr", "images.ssim", "images.clip_score", "images.image_reward", "images.speedup")  # is better
BASELINE = "SparseGPT"


@dataclass
class Table:
    """One metric of one model under one protocol.

    Attributes:
        metric: ``perplexity.<set>``, ``minutes.pruning`` …; or ``zero_shot``, whose columns are tasks.
        columns: what varies from column to column.
        cells: by row and column.
        conditions: what all numbers here hang on.
        letter: of the protocol, where the model has tables of several.
    """

    model: str
    metric: str
    at: str | None
    columns: str
    conditions: dict[str, Any]
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    letter: str = ""

    @property
    def lower_is_better(self) -> bool:
        return self.metric not in HIGHER

    @property
    def names(self) -> list[str]:
        """The columns, in order."""
        found = dict.fromkeys(name for row in self.cells.values() for name in row)
        return list(found) if self.metric == "zero_shot" else sorted(found, key=_order)

    @property
    def seeds(self) -> list[int]:
        return sorted({s for name, row in self.cells.items() if name != "Dense" for cell in row.values() for s in cell.values})

    def title(self) -> str:
        pattern = {self.conditions.get(f"sparsity.{name}") for name in ("pattern", "ratio")} - {None}
        at = f", {self.columns} {self.at}" if self.at and self.at != ALL else ""
        at += f", sparsity {' '.join(sorted(map(str, pattern)))}" if pattern else ""
        return f"{self.model}: {self.metric}{at}" + (f" (protocol {self.letter})" if self.letter else "")


@dataclass
class Report:
    """All tables, and what is not in them.

    Attributes:
        differences: for each model and metric with several tables of one kind, the settings that tell the protocols apart, each
            with its value in every protocol.
        left_out: runs that did not finish, and why.
        allowed: settings that were told not to part tables.
    """

    tables: list[Table]
    differences: dict[str, dict[str, list[Any]]]
    left_out: list[str]
    baseline: str
    allowed: Sequence[str]
    runs: int

    @property
    def title(self) -> str:
        return "1 run" if self.runs == 1 else f"{self.runs} runs"


def gather(
    records: Sequence[Mapping[str, Any]], columns: str = SPARSITY, baseline: str = BASELINE, allowed: Sequence[str] = ()
) -> Report:
    """Put runs into tables. Runs whose conditions differ in anything but the method, what is done beside it, the seed and
    ``columns`` never share one, unless what they differ in is ``allowed``.

    Raises:
        RoseExpError: no run is of the ``baseline``.
    """
    runs = [record for record in records if record["status"] == "finished"]
    left_out = [_why_not(record) for record in records if record["status"] != "finished"]
    rows = _row_names(runs, columns)
    tables: list[Table] = []
    for dense in (False, True):  # a dense model goes into every table that its protocol fits
        for record, row in zip(runs, rows, strict=True):
            if is_dense(record) == dense:
                left_out += _add(tables, record, row, columns, allowed)
    left_out = list(dict.fromkeys(left_out))
    if baseline not in rows and baseline != BASELINE:
        raise RoseExpError(f"--baseline: expected one of {', '.join(dict.fromkeys(rows))}, got {baseline!r}")
    for table in tables:
        _finish(table, baseline)
    order = {name: i for i, name in enumerate(dict.fromkeys(rows))}
    for table in tables:
        table.cells = dict(sorted(table.cells.items(), key=lambda item: (item[0] != "Dense", order[item[0]])))
    tables.sort(key=lambda table: (table.model, table.metric in DESCRIPTIVE, table.metric))
    return Report(tables, _letters(tables), left_out, baseline, allowed, len({record.get("run_id") for record in runs}))


def _why_not(record: Mapping[str, Any]) -> str:
    """Why a run is in no table."""
    why = f"failed: {record['error']}" if record["status"] == "failed" else "not finished, or still running"
    return f"{record['label']} {record.get('run_id')} {why}"


def _add(tables: list[Table], record: Mapping[str, Any], row: str, columns: str, allowed: Sequence[str]) -> list[str]:
    """Put the values of a run where they belong; what found its place taken by another run."""
    taken = []
    model = record["protocol"]["model"]["name"]
    column = column_of(record, columns)
    for metric, at, name, value in _measured(record, column):
        found = without(conditions(record, metric, columns), allowed)
        kind = metric.partition(".")[0] if metric.startswith("zero_shot") else metric
        same = [t for t in tables if (t.model, t.metric) == (model, kind) and _fits(t, at, found, is_dense(record))]
        if not same:
            same = [Table(model, kind, at, columns, found)]
            tables += same
        for table in same:
            places = (table.names or [ALL]) if is_dense(record) and kind != "zero_shot" else [name]
            for place in places:
                if not _put(table, record, row, place, value):
                    taken.append(f"{row} {record.get('run_id')}: another run has its place in {table.title()}, {place}")
    return taken


def _fits(table: Table, at: str | None, found: Mapping[str, Any], dense: bool) -> bool:
    if dense:
        return agree(found, table.conditions)
    return table.at == at and table.conditions == found


def _measured(record: Mapping[str, Any], column: str) -> Iterable[tuple[str, str | None, str, float]]:
    """Metric, the table's own column where it has one for each, the column, and the value."""
    for metric, value in record["metrics"].items():
        if metric.startswith("zero_shot."):
            yield metric, column, metric.removeprefix("zero_shot."), value
        elif metric != "sparsity":
            yield metric, None, column, value
    seconds = record["seconds"]
    if "pruning" in seconds:  # what a job before it in its sweep has done for it counts, and studies of layers do not
        spent = seconds["pruning"] + seconds.get("pruning.shared", 0) - seconds.get("pruning.studying", 0)
        yield MINUTES, None, column, spent / 60


def _put(table: Table, record: Mapping[str, Any], row: str, column: str, value: float) -> bool:
    """Whether the place was free, or held by an earlier record of the same run, or by one with the same value, such as one
    that has measured another text as well."""
    cell = table.cells.setdefault(row, {}).setdefault(column, Cell())
    calibration, seed = record["protocol"]["calibration"], record["config"]["seed"]
    earlier = cell.runs.get(seed)
    if earlier is not None and earlier.get("run_id") != record.get("run_id"):
        return value == cell.values[seed]
    if earlier is None or earlier["started"] <= record["started"]:
        cell.values[seed], cell.runs[seed] = value, record
        cell.draws[seed] = calibration.get("tokens_sha256", calibration.get("noise_sha256")) if calibration else None
    return True


def _finish(table: Table, baseline: str) -> None:
    for row in table.cells.values():
        for column, cell in row.items():
            metric = f"zero_shot.{column}" if table.metric == "zero_shot" else table.metric
            cell.published = find(list(cell.runs.values()), metric, cell.mean)
    for column in table.names:
        pruned = {row: cells[column] for row, cells in table.cells.items() if column in cells and row != "Dense"}
        if table.metric.startswith(JUDGED):
            mark_best(pruned, table.lower_is_better)
        if baseline in pruned and table.metric not in DESCRIPTIVE:
            for row, cell in pruned.items():
                if row != baseline:
                    cell.difference = paired_difference(cell, pruned[baseline])


def _row_names(runs: Sequence[Mapping[str, Any]], columns: str) -> list[str]:
    """The method of each run as the literature calls it, and where several variants of one are there, what tells them apart."""
    kinds = []
    for record in runs:
        own = without(variant(record), [columns])
        kinds.append(json.dumps({} if is_dense(record) else own, sort_keys=True))
    labels: dict[str, str] = {}
    for record, kind in zip(runs, kinds, strict=True):  # a threshold in the columns is in no row's name
        labels[kind] = min(labels.get(kind, record["label"]), record["label"], key=len)
    by_label: dict[str, list[str]] = {}
    for kind, label in labels.items():
        by_label.setdefault(label, []).append(kind)
    names = {}
    for label, variants in by_label.items():
        values = [flat(json.loads(kind)) for kind in variants]
        apart = differing(values)
        for kind, value in zip(variants, values, strict=True):
            told = ", ".join(f"{name.rpartition('.')[2]}={value[name]}" for name in apart if name in value)
            names[kind] = f"{label} ({told})" if told else label
    return [names[kind] for kind in kinds]


def _letters(tables: Sequence[Table]) -> dict[str, dict[str, list[Any]]]:
    """Name the protocols of each model and metric, where there are several, and tell them apart."""
    kinds: dict[tuple[str, str], list[Table]] = {}
    for table in tables:
        kinds.setdefault((table.model, table.metric), []).append(table)
    told = {}
    for (model, metric), of_kind in kinds.items():
        protocols = []
        for table in of_kind:
            if table.conditions not in protocols:
                protocols.append(table.conditions)
        if len(protocols) > 1:
            for table in of_kind:
                place = protocols.index(table.conditions)
                table.letter = chr(ord("A") + place % 26) + (str(place // 26) if place >= 26 else "")
            told[f"{model}: {metric}"] = differing(protocols)
    return told


def _order(column: str) -> tuple[int, float, str]:
    """Numbers by size, then patterns and words."""
    try:
        number = float(column)
    except ValueError:
        return (1, math.inf, column)
    return (0, number, column)
