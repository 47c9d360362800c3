"""Weights & Biases."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...runtime.redaction import redact
from ...settings.tracking import LONGEST_NAME, WandbSettings
from ..tracker import LAYER_NUMBERS, TrackedRun


class Wandb:
    """Weights & Biases. In offline mode, it needs no account and writes to the run's folder, for a later ``wandb sync``."""

    def __init__(self, settings: WandbSettings):
        self.settings = settings.model_copy(update=redact(settings.model_dump()))

    def start(self, run: TrackedRun) -> str:
        """Open a new run, or continue the run of an earlier process under the same ID."""
        import wandb  # slow to import

        self.wandb = wandb
        settings, identity = self.settings, run.identity
        with _redacted_command():  # W&B stores the command line
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                name=settings.name or identity.name[:LONGEST_NAME],
                group=settings.group or (identity.group and identity.group[-LONGEST_NAME:]),
                job_type=settings.job_type,
                tags=list(dict.fromkeys(run.tags)),
                config=dict(run.config),
                dir=str(run.folder),
                id=run.resumed,
                resume="allow" if run.resumed is not None else None,
                reinit="create_new",  # jobs of a sweep run in one process but are separate runs
                settings=wandb.Settings(silent=True),
            )
        return self.run.id

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
        if model is not None and self.settings.save_model:
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
