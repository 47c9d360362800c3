"""CSV files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.escaping import csv_cell
from ...runtime.files import written
from ...settings.tracking import CsvSettings
from ..tracker import TrackedRun


class Csv:
    """``layers.csv`` and ``metrics.csv`` in the run's folder."""

    LAYERS, METRICS = "layers.csv", "metrics.csv"

    def __init__(self, settings: CsvSettings):
        self.writer: csv.DictWriter | None = None

    def start(self, run: TrackedRun) -> None:
        self.folder = run.folder
        self.file = (run.folder / self.LAYERS).open("w", newline="", encoding="utf-8")

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        row = {"step": step, **{name: csv_cell(value) for name, value in report.items()}}
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, list(row))
            self.writer.writeheader()
        self.writer.writerow(row)
        self.file.flush()

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        with written(self.folder / self.METRICS) as place, place.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["metric", "value"])
            writer.writerows((csv_cell(name), value) for name, value in metrics.items())

    def figure(self, name: str, path: Path) -> None:
        """Do nothing, because the file is already in the run's folder."""

    def keep(self, record: Path, model: Path | None) -> None:
        """Do nothing, because the file is already in the run's folder."""

    def finish(self, failed: bool) -> None:
        self.file.close()
