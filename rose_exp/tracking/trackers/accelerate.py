"""Aim, Comet, MLflow and Trackio, through the trackers of Hugging Face accelerate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.redaction import redacted
from ...settings.leaves import flat
from ...settings.tracking import AccelerateSettings
from ..tracker import LAYER_NUMBERS, TrackedRun


class Accelerate:
    """A tracker of accelerate. It receives settings and numbers, and MLflow also figures and the run record."""

    def __init__(self, settings: AccelerateSettings):
        self.settings, self.project = settings, redacted(settings.project)

    def start(self, run: TrackedRun) -> None:
        from accelerate import PartialState  # slow to import
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers ask it for the rank of this process
        arguments = self._arguments(run) | self.settings.options
        self.tracker = LOGGER_TYPE_TO_CLASS[self.settings.tracker](**arguments)
        self.tracker.start()
        facts = run.config | {"name": run.identity.name, "group": run.identity.group, "tags": list(run.tags)}
        plain = {name: _plain(value) for name, value in flat(facts).items()}
        try:
            self.tracker.store_init_configuration(plain)
        except Exception:
            self.tracker.finish()  # an MLflow run that stays active would stop the next job of a sweep
            raise

    def _arguments(self, run: TrackedRun) -> dict[str, Any]:
        """Return the names of project and run, which the trackers take as different arguments."""
        name = run.identity.name
        arguments: dict[str, dict[str, Any]] = {
            "aim": {"run_name": name, "experiment": self.project, "logging_dir": str(run.folder.parent)},
            "comet_ml": {"run_name": self.project},
            "mlflow": {"experiment_name": self.project, "run_name": name},
            "trackio": {"run_name": self.project, "name": name, "group": run.identity.group},
        }
        return arguments[self.settings.tracker]

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        self.tracker.log({f"layer/{name}": float(report[name]) for name in LAYER_NUMBERS}, step=step)

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        self.tracker.log(dict(metrics))

    def figure(self, name: str, path: Path) -> None:
        self._store(path)

    def keep(self, record: Path, model: Path | None) -> None:
        self._store(record)

    def _store(self, path: Path) -> None:
        if self.settings.tracker == "mlflow":  # the only one of these that stores files
            self.tracker.log_artifact(str(path))

    def finish(self, failed: bool) -> None:
        if failed:
            self.tracker.log({"failed": 1.0})
        self.tracker.finish()


def _plain(value: Any) -> Any:
    """Return a number or text as it is, and any other value as JSON."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
