"""Records in a plain table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tracking.record import FILE_NAME, read_record

ZERO_SHOT = "zero_shot."
IMAGES = "images."


def collect_records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The run records below ``folder``, in the order in which the runs were started.

    Raises:
        RoseExpError: a record that cannot be read.
    """
    records = [(path, read_record(path)) for path in folder.rglob(FILE_NAME)]
    return sorted(records, key=lambda item: (item[1].get("started", ""), str(item[0])))


def format_table(records: Sequence[dict[str, Any]]) -> str:
    """A table in plain text: of several models the model, method, pattern, sparsity reached, every metric, seconds."""
    measured = list(dict.fromkeys(name for record in records for name in record["metrics"] if name != "sparsity"))
    shown = [f"{name.removeprefix(ZERO_SHOT)} %" if name.startswith(ZERO_SHOT) else name for name in measured]
    header = ["method", "pattern", "sparsity", *shown, "seconds"]
    rows = [_row(record, measured) for record in records]
    models = [record["config"].get("model") for record in records]
    if any(model != models[0] for model in models):
        header.insert(0, "model")
        for row, record in zip(rows, records, strict=True):
            row.insert(0, record["protocol"].get("model", {}).get("name", "-"))  # none where it failed before it was read
    left = header.index("sparsity")  # columns of words
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _row(record: dict[str, Any], measured: Sequence[str]) -> list[str]:
    metrics, config = record["metrics"], record["config"]
    sparsity = config["sparsity"]
    dense = config["method"]["name"] == "dense"
    pattern = "-" if dense else sparsity["pattern"]
    if record["status"] != "finished":
        return [record["label"], pattern, record["status"], *("" for _ in measured), ""]
    reached = f"{metrics['sparsity']:.4f}"
    values = [number(name, metrics[name]) if name in metrics else "" for name in measured]
    stages = [s for name, s in record["seconds"].items() if "." not in name]  # pruning.solving is a part of pruning
    return [record["label"], pattern, reached, *values, f"{sum(stages):.0f}"]


def number(metric: str, value: float) -> str:
    if metric.startswith(IMAGES):
        return f"{value:.4g}"  # of any size
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.3g}"
