"""Experiment trackers: Weights & Biases, TensorBoard and CSV, behind one interface."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..runtime.escaping import csv_cell, markdown_block
from ..runtime.files import written
from ..runtime.redaction import redact
from ..settings.tracking import LONGEST_NAME, TrackingSettings
from .record import RunRecord

log = logging.getLogger(__name__)

LAYER_NUMBERS = ("error", "relative_range", "reordered", "damping", "seconds", "sparsity")  # logged for each layer


@dataclass(frozen=True)
class Identity:
    """Name of a run in a tracker.

    Attributes:
        name: the settings that differ from the other jobs of its sweep.
        group: name of the sweep; None for a single run.
    """

    name: str
    group: str | None = None


class Tracker(Protocol):
    """Interface of all trackers."""

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        """Log a pruned layer; ``report`` is an entry of the record's ``layers``."""

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        """Log all metrics and a table of all layers."""

    def figure(self, name: str, path: Path) -> None:
        """Log a PNG file."""

    def keep(self, record: Path, model: Path | None) -> None:
        """Store the run record, and the pruned model unless it is None."""

    def finish(self, failed: bool) -> None:
        """Close the tracker at the end of the run."""


class Nowhere:
    """Discards everything."""

    def layer(self, step: int, report: Mapping[str, Any]) -> None: ...

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None: ...

    def figure(self, name: str, path: Path) -> None: ...

    def keep(self, record: Path, model: Path | None) -> None: ...

    def finish(self, failed: bool) -> None: ...


class Wandb:
    """Weights & Biases. In offline mode, it needs no account and writes to the run's folder, for a later ``wandb sync``."""

    def __init__(
        self, settings: TrackingSettings, config: dict[str, Any], identity: Identity, folder: Path, tags: Sequence[str]
    ):
        import wandb  # slow to import

        self.wandb = wandb
        with _redacted_command():  # W&B stores the command line
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                name=settings.name or identity.name[:LONGEST_NAME],
                group=settings.group or (identity.group and identity.group[-LONGEST_NAME:]),
                job_type=settings.job_type,
                tags=list(dict.fromkeys(tags)),
                config=config,
                dir=str(folder),
                reinit="create_new",  # jobs of a sweep run in one process but are separate runs
                settings=wandb.Settings(silent=True),
            )

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        self.run.log(
            {f"layer/{name}": float(report[name]) for name in LAYER_NUMBERS} | {"layer/name": report["name"]}, step=step
        )

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        self.run.summary.update(dict(metrics))
        if layers:
            names = list(layers[0])
            table = self.wandb.Table(columns=names, data=[[layer[name] for name in names] for layer in layers])
            self.run.log({"layers": table})

    def figure(self, name: str, path: Path) -> None:
        self.run.log({f"figures/{name}": self.wandb.Image(str(path))})

    def keep(self, record: Path, model: Path | None) -> None:
        record_artifact = self.wandb.Artifact(f"run-{self.run.id}", type="run-record")
        record_artifact.add_file(str(record))
        self.run.log_artifact(record_artifact)
        if model is not None:
            model_artifact = self.wandb.Artifact(f"model-{self.run.id}", type="model")
            model_artifact.add_dir(str(model))
            self.run.log_artifact(model_artifact)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


@contextmanager
def _redacted_command() -> Iterator[None]:
    """Replace the command line of this process by one without secrets while the body runs."""
    before = sys.argv
    sys.argv = redact(list(before))
    try:
        yield
    finally:
        sys.argv = before


class TensorBoard:
    """TensorBoard event files in the run's folder."""

    FOLDER = "tensorboard"

    def __init__(
        self, settings: TrackingSettings, config: dict[str, Any], identity: Identity, folder: Path, tags: Sequence[str]
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / self.FOLDER))
        self.writer.add_text("config", markdown_block(json.dumps(config, indent=1)))

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        for name in LAYER_NUMBERS:
            self.writer.add_scalar(f"layer/{name}", float(report[name]), step)

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value)

    def figure(self, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(f"figures/{name}", np.asarray(image.convert("RGB")), dataformats="HWC")

    def keep(self, record: Path, model: Path | None) -> None:
        """Do nothing, because the file is already in the run's folder."""

    def finish(self, failed: bool) -> None:
        self.writer.add_text("status", "failed" if failed else "finished")
        self.writer.close()


class Csv:
    """``layers.csv`` and ``metrics.csv`` in the run's folder."""

    LAYERS, METRICS = "layers.csv", "metrics.csv"

    def __init__(
        self, settings: TrackingSettings, config: dict[str, Any], identity: Identity, folder: Path, tags: Sequence[str]
    ):
        self.folder = folder
        self.file = (folder / self.LAYERS).open("w", newline="", encoding="utf-8")
        self.writer: csv.DictWriter | None = None

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


KINDS: dict[str, type] = {"wandb": Wandb, "tensorboard": TensorBoard, "csv": Csv}
FILES = {"csv": (Csv.LAYERS, Csv.METRICS), "tensorboard": (TensorBoard.FOLDER,)}


def destination(settings: TrackingSettings) -> dict[str, Any]:
    """Return what identifies the place that a tracker logs to. The record lists these places under ``tracked``."""
    names = ("kind", "mode", "project", "entity", "save_model") if settings.kind == "wandb" else ("kind",)
    return redact({name: getattr(settings, name) for name in names})


def is_tracked(settings: TrackingSettings, record: Mapping[str, Any], folder: Path) -> bool:
    """Return whether a finished run has been logged to the tracker, and whether the files of the tracker still exist.

    Args:
        folder: the run's folder.
    """
    return destination(settings) in record.get("tracked", []) and all(
        (folder / name).exists() for name in FILES.get(settings.kind, ())
    )


class FailSafeTracker:
    """A wrapper that keeps secrets from a tracker, and failures of the tracker from failing the run.

    The first failure is logged and recorded. After it, the tracker only receives ``finish``.
    """

    def __init__(self, settings: TrackingSettings, record: RunRecord, identity: Identity, folder: Path, tags: Sequence[str]):
        self.record, self.settings = record, settings
        self.tracker: Tracker = Nowhere()
        self.opened: Tracker | None = None
        if not settings.active or not record.kept:
            return
        record.data["tracking"] = {"kind": settings.kind, "failure": None}
        data = record.data
        config = redact({"label": data["label"], "run_id": data["run_id"]} | data["config"])
        named = settings.model_copy(update=redact(settings.model_dump()))
        identity = Identity(*redact([identity.name, identity.group]))
        try:
            self.tracker = self.opened = KINDS[settings.kind](named, config, identity, folder, redact(list(tags)))
        except Exception as error:  # no error of a tracker may end the run
            self._failed("start", error)

    def log(self, what: str, *arguments: Any) -> None:
        """Call the tracker's method ``what`` with ``arguments``."""
        try:
            getattr(self.tracker, what)(*redact(arguments))
        except Exception as error:
            self._failed(what, error)

    def finish(self, failed: bool) -> None:
        """Close the tracker, even after it failed."""
        if self.opened is None:
            return
        try:
            self.opened.finish(failed)
        except Exception as error:
            self._failed("finish", error)
        self.opened = None
        data = self.record.data
        if not failed and data["tracking"]["failure"] is None:
            data["tracked"] = [*data.get("tracked", []), destination(self.settings)]

    def _failed(self, what: str, error: Exception) -> None:
        reason = f"{what}: {type(error).__name__}: {error}"
        log.warning("tracking with %s failed, the run continues without it: %s", self.record.data["tracking"]["kind"], reason)
        self.record.data["tracking"]["failure"] = reason
        self.tracker = Nowhere()
