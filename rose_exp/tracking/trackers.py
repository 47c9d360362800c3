"""Where a run is told as it goes: Weights & Biases, TensorBoard, CSV, or nowhere. All of them from the same calls."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..settings.schema import TrackingSettings
from .record import RunRecord

log = logging.getLogger(__name__)

LAYER_NUMBERS = ("error", "relative_range", "reordered", "damping", "seconds", "sparsity")  # a step of each


@dataclass(frozen=True)
class Identity:
    """What a run is called beside its kin.

    Attributes:
        name: what differs from the other jobs of its sweep.
        group: the sweep; None: a run by itself.
    """

    name: str
    group: str | None = None


class Tracker(Protocol):
    """What every tracker can be told."""

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        """One pruned layer, as in the record's ``layers``."""

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        """All that was measured, and a table of all layers."""

    def figure(self, name: str, path: Path) -> None:
        """A PNG."""

    def keep(self, record: Path, model: Path | None) -> None:
        """The run record, and the pruned model where it is to be kept."""

    def finish(self, failed: bool) -> None:
        """The run is over; nothing more comes."""


class Nowhere:
    """Tells nobody."""

    def layer(self, step: int, report: Mapping[str, Any]) -> None: ...

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None: ...

    def figure(self, name: str, path: Path) -> None: ...

    def keep(self, record: Path, model: Path | None) -> None: ...

    def finish(self, failed: bool) -> None: ...


class Wandb:
    """A run of Weights & Biases; offline it needs no account, and lies in the run's folder until ``wandb sync``."""

    def __init__(
        self, settings: TrackingSettings, config: dict[str, Any], identity: Identity, folder: Path, tags: Sequence[str]
    ):
        import wandb  # slow to import

        self.wandb = wandb
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=settings.name or identity.name,
            group=settings.group or identity.group,
            job_type=settings.job_type,
            tags=list(tags),
            config=config,
            dir=str(folder),
            reinit="create_new",  # the jobs of a sweep share a process, and nothing else
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
        kept = self.wandb.Artifact(f"run-{self.run.id}", type="run-record")
        kept.add_file(str(record))
        self.run.log_artifact(kept)
        if model is not None:
            pruned = self.wandb.Artifact(f"model-{self.run.id}", type="model")
            pruned.add_dir(str(model))
            self.run.log_artifact(pruned)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class TensorBoard:
    """An event file in the run's folder."""

    def __init__(
        self, settings: TrackingSettings, config: dict[str, Any], identity: Identity, folder: Path, tags: Sequence[str]
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{config}\n```")

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
        """Files stay in the run's folder."""

    def finish(self, failed: bool) -> None:
        self.writer.add_text("status", "failed" if failed else "finished")
        self.writer.close()


class Csv:
    """``layers.csv`` and ``metrics.csv`` in the run's folder."""

    def __init__(
        self, settings: TrackingSettings, config: dict[str, Any], identity: Identity, folder: Path, tags: Sequence[str]
    ):
        self.folder = folder
        self.file = (folder / "layers.csv").open("w", newline="", encoding="utf-8")
        self.writer: csv.DictWriter | None = None

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        row = {"step": step, **report}
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, list(row))
            self.writer.writeheader()
        self.writer.writerow(row)
        self.file.flush()

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        with (self.folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["metric", "value"])
            writer.writerows(metrics.items())

    def figure(self, name: str, path: Path) -> None:
        """Files stay in the run's folder."""

    def keep(self, record: Path, model: Path | None) -> None:
        """Files stay in the run's folder."""

    def finish(self, failed: bool) -> None:
        self.file.close()


KINDS: dict[str, type] = {"wandb": Wandb, "tensorboard": TensorBoard, "csv": Csv}


class Guarded:
    """A tracker that may fail without the run failing: the first failure is logged and put into the record, and the tracker is
    told nothing more but that the run is over."""

    def __init__(self, settings: TrackingSettings, record: RunRecord, identity: Identity, folder: Path, tags: Sequence[str]):
        self.record = record
        self.tracker: Tracker = Nowhere()
        self.opened: Tracker | None = None
        if settings.kind == "none" or (settings.kind == "wandb" and settings.mode == "disabled") or not record.kept:
            return
        record.data["tracking"] = {"kind": settings.kind, "failure": None}
        try:
            self.tracker = self.opened = KINDS[settings.kind](settings, record.data["config"], identity, folder, tags)
        except Exception as error:  # whatever a tracker does wrong, the run is worth more
            self._failed("start", error)

    def tell(self, what: str, *arguments: Any) -> None:
        """Call the tracker's method ``what``."""
        try:
            getattr(self.tracker, what)(*arguments)
        except Exception as error:
            self._failed(what, error)

    def finish(self, failed: bool) -> None:
        """End the tracker's run, also after a failure of its own."""
        if self.opened is None:
            return
        try:
            self.opened.finish(failed)
        except Exception as error:
            self._failed("finish", error)
        self.opened = None

    def _failed(self, what: str, error: Exception) -> None:
        reason = f"{what}: {type(error).__name__}: {error}"
        log.warning("tracking with %s failed, the run goes on without it: %s", self.record.data["tracking"]["kind"], reason)
        self.record.data["tracking"]["failure"] = reason
        self.tracker = Nowhere()
