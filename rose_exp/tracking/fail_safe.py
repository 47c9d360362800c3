"""The trackers of a run, none of whose failures stops the run or another tracker."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runtime.redaction import redact
from ..settings.schema import Settings
from ..settings.tracking import TrackingSettings
from .record import RunRecord
from .tracker import Identity, TrackedRun, Tracker
from .trackers import FILES, create

log = logging.getLogger(__name__)


class Trackers:
    """All trackers of a run. No secret reaches them.

    The record lists them under ``tracking``, with the failure of each, and under ``tracked`` those that have the results of the
    finished run.

    Args:
        record: the record of the run.
        folder: the folder of the run.
        identity: the name of the run; if None, its method, model and pattern.
        names: the trackers to use; if None, all that the settings select.
        earlier: the entries of ``tracking`` in the record of the interrupted run that this run continues.
    """

    def __init__(
        self,
        settings: Settings,
        record: RunRecord,
        folder: Path,
        identity: Identity | None = None,
        names: Sequence[str] | None = None,
        earlier: Sequence[Mapping[str, Any]] = (),
    ):
        self.record, self.trackers = record, []
        names = settings.tracking.names if names is None else names
        if not names or not record.kept:
            return
        identity = identity or Identity(f"{settings.label} {settings.model.name} {settings.sparsity.parsed}")
        data = record.data
        config = redact({"label": data["label"], "run_id": data["run_id"]} | data["config"])
        run = TrackedRun(Identity(*redact([identity.name, identity.group])), config, folder, redact(list(settings.tags)))
        self.trackers = [FailSafeTracker(settings.tracking, name, run, earlier) for name in names]
        others = [entry for entry in entries(data) if entry["kind"] not in names]
        data["tracking"] = [*others, *(tracker.entry for tracker in self.trackers)]

    def log(self, what: str, *arguments: Any) -> None:
        """Call the method ``what`` of each tracker with ``arguments``."""
        redacted = redact(arguments)
        for tracker in self.trackers:
            tracker.log(what, *redacted)

    def finish(self, failed: bool) -> None:
        """Close all trackers, even those that failed."""
        complete = [tracker.place for tracker in self.trackers if tracker.finish(failed) and not failed]
        if complete:
            data = self.record.data
            data["tracked"] = [*(place for place in data.get("tracked", []) if place not in complete), *complete]
        self.trackers = []


class FailSafeTracker:
    """A tracker whose failures do not fail the run.

    The first failure is logged and recorded. After it, the tracker only receives ``finish``.

    Attributes:
        place: what identifies the place that the tracker logs to.
        entry: the tracker's entry in the record.
    """

    def __init__(self, settings: TrackingSettings, name: str, run: TrackedRun, earlier: Sequence[Mapping[str, Any]] = ()):
        self.name, self.place = name, destination(settings, name)
        self.entry: dict[str, Any] = self.place | {"failure": None}
        self.tracker: Tracker | None = None
        ids = [old["id"] for old in earlier if "id" in old and all(old.get(k) == v for k, v in self.place.items())]
        try:
            self.tracker = create(settings, name)
            own_id = self.tracker.start(replace(run, resumed=ids[0] if ids else None))
        except Exception as error:  # no error of a tracker may end the run
            self._failed("start", error)
            self.tracker = None
            return
        if own_id is not None:
            self.entry["id"] = str(own_id)

    def log(self, what: str, *arguments: Any) -> None:
        """Call the tracker's method ``what`` with ``arguments``."""
        if self.tracker is not None and self.entry["failure"] is None:
            self._call(what, *arguments)

    def finish(self, failed: bool) -> bool:
        """Close the tracker, even after it failed. Return whether it has everything that was logged."""
        if self.tracker is not None:
            self._call("finish", failed)
        return self.entry["failure"] is None

    def _call(self, what: str, *arguments: Any) -> None:
        try:
            getattr(self.tracker, what)(*arguments)
        except Exception as error:
            self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        reason = f"{what}: {type(error).__name__}: {error}"
        log.warning("tracking with %s failed, the run continues without it: %s", self.name, reason)
        if self.entry["failure"] is None:
            self.entry["failure"] = reason


def destination(settings: TrackingSettings, name: str) -> dict[str, Any]:
    """Return what identifies the place that a tracker logs to. The record lists these places under ``tracked``."""
    if name in settings.own:
        values = settings.own[name].model_dump(mode="json", include=set(settings.own[name].place))
    else:
        values = {"options": dict(settings.others[name])}
    return redact({"kind": name} | values)


def untracked(settings: TrackingSettings, record: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the trackers that lack the results of a finished run, or whose files no longer exist.

    Args:
        folder: the run's folder.
    """
    places = record.get("tracked", [])
    return [
        name
        for name in settings.names
        if destination(settings, name) not in places or not all((folder / file).exists() for file in FILES.get(name, ()))
    ]


def entries(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the trackers of a run and their failures. Records of earlier versions have at most one tracker."""
    tracking = record.get("tracking") or []
    return [dict(tracking)] if isinstance(tracking, Mapping) else list(tracking)
