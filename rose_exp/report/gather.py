"""Group run records into tables of methods × sparsities, or × any other setting, with one protocol per table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.errors import RoseExpError, suggest
from ..settings.effective import complete, settings_of, without
from ..settings.effects import EFFECTS
from ..settings.leaves import flat
from ..tracking.record import REORDERED
from .cells import Cell, Repeat, mark_best, paired_difference, windows_needed
from .conditions import SPARSITY, agree, column_of, conditions, depends, differing, is_dense, variant
from .published import find

ALL = "all"  # column of a dense model in a table without other columns
MINUTES = "minutes.pruning"
DESCRIPTIVE = (MINUTES, REORDERED)  # metrics without differences to a baseline
JUDGED = ("perplexity.", "kl_divergence.", "top1_agreement.", "zero_shot", "images.", MINUTES)  # metrics with a best value
# metrics for which higher is better
HIGHER = (
    *("zero_shot", "top1_agreement.", "images.psnr", "images.ssim"),
    *("images.clip_score", "images.image_reward", "images.recognized", "images.speedup"),
)
BASELINE = "SparseGPT"


@dataclass
class Table:
    """One metric of one model under one protocol.

    Attributes:
        metric: such as ``perplexity.<set>`` or ``minutes.pruning``; or ``zero_shot``, whose columns are tasks.
        at: for ``zero_shot``, the value of the setting ``columns``, which is shared by the whole table; otherwise None.
        columns: name of the setting that varies between columns.
        cells: cells by row and column.
        conditions: everything that the numbers in the table depend on.
        letter: letter of the protocol, if the model has tables of several protocols for the metric.
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
        return not self.metric.startswith(HIGHER)

    @property
    def names(self) -> list[str]:
        """Column names in order."""
        names = dict.fromkeys(name for row in self.cells.values() for name in row)
        return list(names) if self.metric == "zero_shot" else sorted(names, key=_order)

    @property
    def seeds(self) -> list[int]:
        return sorted({repeat.seed for repeat in self._repeats()})

    @property
    def replicates(self) -> list[int]:
        return sorted({repeat.replicate for repeat in self._repeats()})

    def _repeats(self) -> set[Repeat]:
        return {r for name, row in self.cells.items() if name != "Dense" for cell in row.values() for r in cell.values}

    def title(self) -> str:
        pattern = {self.conditions.get(f"sparsity.{name}") for name in ("pattern", "ratio")} - {None}
        at = f", {self.columns} {self.at}" if self.at and self.at != ALL else ""
        at += f", sparsity {' '.join(sorted(map(str, pattern)))}" if pattern else ""
        return f"{self.model}: {self.metric}{at}" + (f" (protocol {self.letter})" if self.letter else "")


@dataclass
class Report:
    """All tables, and what they leave out.

    Attributes:
        differences: for each model and metric with several protocols, the settings in which these differ, each with its value
            in every protocol.
        left_out: runs or values outside the tables, with the reason.
        allowed: settings that may differ within a table.
        runs: number of finished runs.
        resolve: relative difference for which the report states the required number of pairs; None to leave it out.
    """

    tables: list[Table]
    differences: dict[str, dict[str, list[Any]]]
    left_out: list[str]
    baseline: str
    allowed: Sequence[str]
    runs: int
    resolve: float | None = None

    @property
    def title(self) -> str:
        return "1 run" if self.runs == 1 else f"{self.runs} runs"


def gather(
    records: Sequence[Mapping[str, Any]],
    columns: str = SPARSITY,
    baseline: str = BASELINE,
    allowed: Sequence[str] = (),
    resolve: float | None = None,
) -> Report:
    """Group runs into tables.

    Runs share a table only if their conditions agree. The method and its options, the seed, the replicate, ``columns`` and the
    settings in ``allowed`` may differ.

    Args:
        columns: setting that varies between columns.
        baseline: row that the other rows are compared with.
        resolve: relative difference for which to state the required number of pairs, such as 0.05.

    Raises:
        RoseExpError: no run has the setting ``columns`` or one in ``allowed``; or no row has the name ``baseline``, unless that
            is the default.
    """
    runs = [record for record in records if record["status"] == "finished"]
    check_names(runs, columns, allowed)
    left_out = [_why_not(record) for record in records if record["status"] != "finished"]
    rows = _row_names(runs, columns)
    tables: list[Table] = []
    for dense in (False, True):  # last: a dense model joins every table with a matching protocol
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
    count = len({record.get("run_id") for record in runs})
    return Report(tables, _letters(tables), left_out, baseline, allowed, count, resolve)


def check_names(runs: Sequence[Mapping[str, Any]], columns: str, allowed: Sequence[str]) -> None:
    """Check that at least one run has the setting ``columns``, and one each setting in ``allowed``.

    Raises:
        RoseExpError: otherwise, with the most similar name.
    """
    if not runs:
        return
    names = {name for record in runs for name in complete(record["config"])}
    settings = _with_groups(names | {name for name in EFFECTS if "*" not in name})
    if columns not in settings:
        raise RoseExpError(f"--columns: expected the name of a setting, got {columns!r}{suggest(columns, settings)}")
    facts = _with_groups({name for record in runs for name in flat(record["protocol"], "protocol.")})
    texts = [text for record in runs for text in (record["protocol"].get("evaluation") or {}).values()]
    facts |= _with_groups({name for text in texts for name in flat(text, "protocol.evaluation.")})
    for name in allowed:
        if name not in settings | facts:
            raise RoseExpError(f"--allow: expected the name of a setting, got {name!r}{suggest(name, settings | facts)}")


def _with_groups(names: Iterable[str]) -> set[str]:
    """Return dotted names, and the groups that contain them."""
    return {".".join(name.split(".")[: length + 1]) for name in names for length in range(len(name.split(".")))}


def _why_not(record: Mapping[str, Any]) -> str:
    """Return the reason why a run is in no table."""
    reason = f"failed: {record['error']}" if record["status"] == "failed" else "not finished, or still running"
    return f"{record['label']} {record.get('run_id')} {reason}"


def _add(tables: list[Table], record: Mapping[str, Any], row: str, columns: str, allowed: Sequence[str]) -> list[str]:
    """Add the values of a run to the tables; return a line for each cell that another run already occupies."""
    conflicts = []
    model = record["protocol"]["model"]["name"]
    column = column_of(record, columns)
    for metric, at, name, value in _measured(record, column):
        record_conditions = without(conditions(record, metric, columns), allowed)
        kind = metric.partition(".")[0] if metric.startswith("zero_shot") else metric
        everywhere = is_dense(record) and not depends(record, metric, columns)  # in every column
        same = [table for table in tables if (table.model, table.metric) == (model, kind)]
        same = [table for table in same if _fits(table, record, record_conditions) and (everywhere or table.at == at)]
        if not same:
            same = [Table(model, kind, at, columns, record_conditions)]
            tables += same
        for table in same:
            places = (table.names or [ALL]) if everywhere and kind != "zero_shot" else [name]
            for place in places:
                if not _put(table, record, row, place, value):
                    conflicts.append(f"{row} {record.get('run_id')}: another run occupies its cell in {table.title()}, {place}")
    return conflicts


def _fits(table: Table, record: Mapping[str, Any], record_conditions: Mapping[str, Any]) -> bool:
    if is_dense(record):  # has no calibration
        return agree(record_conditions, table.conditions)
    return table.conditions == record_conditions


def _measured(record: Mapping[str, Any], column: str) -> Iterable[tuple[str, str | None, str, float]]:
    """Yield each metric with the table's ``at``, the name of the column and the value."""
    for metric, value in record["metrics"].items():
        if metric.startswith("zero_shot."):
            yield metric, column, metric.removeprefix("zero_shot."), value
        elif metric != "sparsity":
            yield metric, None, column, value
    seconds = record["seconds"]
    if "pruning" in seconds:  # includes work shared with an earlier job of the sweep, excludes layer studies
        spent = seconds["pruning"] + seconds.get("pruning.shared", 0) - seconds.get("pruning.studying", 0)
        yield MINUTES, None, column, spent / 60


def _put(table: Table, record: Mapping[str, Any], row: str, column: str, value: float) -> bool:
    """Add a value to a cell; return False if another run occupies it with another value.

    Two runs have the same value if, for example, one of them measures an additional text.
    """
    cell = table.cells.setdefault(row, {}).setdefault(column, Cell())
    calibration, repeat = record["protocol"]["calibration"], repeat_of(record)
    earlier = cell.runs.get(repeat)
    if earlier is not None and earlier.get("run_id") != record.get("run_id"):
        return value == cell.values[repeat]
    if earlier is None or earlier["started"] <= record["started"]:
        cell.values[repeat], cell.runs[repeat] = value, record
        cell.draws[repeat] = calibration.get("tokens_sha256", calibration.get("noise_sha256")) if calibration else None
    return True


def repeat_of(record: Mapping[str, Any]) -> Repeat:
    """Return the seed and the replicate of a run; the replicate is 0 if it has no effect."""
    replicates = [setting.value for setting in settings_of(record["config"]) if setting.effect.role == "replicate"]
    return Repeat(record["config"]["seed"], *replicates)


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
                    cell.windows = windows_needed(cell, pruned[baseline], table.metric)


def _row_names(runs: Sequence[Mapping[str, Any]], columns: str) -> list[str]:
    """Return the row name of each run: its label, and the options in which it differs from other rows with the same label."""
    kinds = []
    for record in runs:
        options = variant(record, columns)
        kinds.append(json.dumps({} if is_dense(record) else options, sort_keys=True))
    labels: dict[str, str] = {}
    for record, kind in zip(runs, kinds, strict=True):  # labels of one row may differ by the setting in the columns
        labels[kind] = min(labels.get(kind, record["label"]), record["label"], key=len)
    by_label: dict[str, list[str]] = {}
    for kind, label in labels.items():
        by_label.setdefault(label, []).append(kind)
    names = {}
    for label, variants in by_label.items():
        values = [flat(json.loads(kind)) for kind in variants]
        differences = differing(values)
        for kind, value in zip(variants, values, strict=True):
            suffix = ", ".join(f"{name.rpartition('.')[2]}={value[name]}" for name in differences if name in value)
            names[kind] = f"{label} ({suffix})" if suffix else label
    return [names[kind] for kind in kinds]


def _letters(tables: Sequence[Table]) -> dict[str, dict[str, list[Any]]]:
    """Assign a letter to each protocol of a model and metric with several; return the settings in which these differ."""
    kinds: dict[tuple[str, str], list[Table]] = {}
    for table in tables:
        kinds.setdefault((table.model, table.metric), []).append(table)
    differences = {}
    for (model, metric), kind_tables in kinds.items():
        protocols = []
        for table in kind_tables:
            if table.conditions not in protocols:
                protocols.append(table.conditions)
        if len(protocols) > 1:
            for table in kind_tables:
                place = protocols.index(table.conditions)
                table.letter = chr(ord("A") + place % 26) + (str(place // 26) if place >= 26 else "")
            differences[f"{model}: {metric}"] = differing(protocols)
    return differences


def _order(column: str) -> tuple[int, float, str]:
    """Sort key for columns: numbers by value, then all other names."""
    try:
        number = float(column)
    except ValueError:
        return (1, math.inf, column)
    return (0, number, column)
