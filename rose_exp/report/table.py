"""Run records as a plain table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.errors import RoseExpError
from ..runtime.escaping import terminal
from ..settings.effective import without
from ..settings.effects import without_effect
from ..settings.leaves import flat
from ..tracking import read_record
from ..tracking.record import FILE_NAME, REORDERED
from .conditions import differing

log = logging.getLogger(__name__)

ZERO_SHOT = "zero_shot."
IMAGES = "images."
UNMEASURED = ("sparsity", REORDERED)  # metrics with a column of their own


def collect_records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the run records below ``folder``, in the order in which the runs started. Skip damaged ones with a warning."""
    records = []
    for path in folder.rglob(FILE_NAME):
        try:
            records.append((path, read_record(path)))
        except RoseExpError as error:
            log.warning("skipped: %s", terminal(str(error)))
    return sorted(records, key=lambda item: (item[1]["started"], str(item[0])))


def format_table(records: Sequence[dict[str, Any]]) -> str:
    """Return a plain text table of the method, pattern, measured sparsity, metrics and seconds of each run.

    Records of several models add a column with the model. Records with an ordering add ``reordered``: the number of layers that
    it reordered, out of all pruned layers. If records with equal models, methods and patterns have different settings, such as
    seeds, these are in a column of their own.
    """
    measured = list(dict.fromkeys(name for record in records for name in record["metrics"] if name not in UNMEASURED))
    ordered = any(REORDERED in record["metrics"] for record in records)
    shown = [f"{name.removeprefix(ZERO_SHOT)} %" if name.startswith(ZERO_SHOT) else name for name in measured]
    header = ["method", "pattern", "sparsity", *(["reordered"] if ordered else []), *shown, "seconds"]
    rows = [_row(record, measured, ordered) for record in records]
    models = [record["config"].get("model") for record in records]
    if any(model != models[0] for model in models):
        header.insert(0, "model")
        for row, record in zip(rows, records, strict=True):
            row.insert(0, record["protocol"].get("model", {}).get("name", "-"))  # a run may fail before the model loads
    if any(different := _different_settings(records, [tuple(row[: header.index("sparsity")]) for row in rows])):
        for row, text in zip(rows, different, strict=True):
            row.insert(header.index("sparsity"), text)
        header.insert(header.index("sparsity"), "settings")
    return aligned(header, rows, header.index("sparsity"))


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """Return lines with aligned columns.

    Args:
        text_columns: number of columns that are aligned to the left; the others contain numbers.
    """
    header, *rows = ([terminal(cell) for cell in row] for row in [header, *rows])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _different_settings(records: Sequence[dict[str, Any]], names: Sequence[tuple[str, ...]]) -> list[str]:
    """Return for each record the settings in which it differs from records of the same name, except what the table shows."""
    shown = [*without_effect(), "model", "method.name", "sparsity.pattern", "sparsity.ratio"]
    texts = [""] * len(records)
    for name in dict.fromkeys(names):
        places = [place for place, other in enumerate(names) if other == name]
        found = differing([without(flat(records[place]["config"], ""), shown) for place in places])
        ends = [setting.rpartition(".")[2] for setting in found]
        for number, place in enumerate(places):
            parts = [
                f"{end if ends.count(end) == 1 else setting}={values[number]}"
                for end, (setting, values) in zip(ends, found.items(), strict=True)
            ]
            texts[place] = " ".join(parts)
    return texts


def _row(record: dict[str, Any], measured: Sequence[str], ordered: bool) -> list[str]:
    metrics, config = record["metrics"], record["config"]
    sparsity = config["sparsity"]
    dense = config["method"]["name"] == "dense"
    pattern = "-" if dense else sparsity["pattern"]
    if record["status"] != "finished":
        return [record["label"], pattern, record["status"], *([""] if ordered else []), *("" for _ in measured), ""]
    reached = f"{metrics['sparsity']:.4f}" if "sparsity" in metrics else ""
    values = [number(name, metrics[name]) if name in metrics else "" for name in measured]
    stages = [s for name, s in record["seconds"].items() if "." not in name]  # pruning.solving is a part of pruning
    moved = f"{metrics[REORDERED]}/{len(record['layers'])}" if REORDERED in metrics else ""
    return [record["label"], pattern, reached, *([moved] if ordered else []), *values, f"{sum(stages):.0f}"]


def number(metric: str, value: float) -> str:
    if metric.startswith(IMAGES):
        return f"{value:.4g}"  # magnitudes vary
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.3g}"
