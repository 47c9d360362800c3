"""Comparison of a finished run with a request for the same run ID.

A run ID covers everything that can change a result. It does not cover other files of a run, such as a saved model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..report.figures import FOLDER, SHEET, STUDIES, draw_figures
from ..settings.effective import complete, effective, within
from ..settings.schema import Settings
from ..tracking import FailSafeTracker, Identity, is_tracked
from ..tracking.record import write_record
from .folder import RunFolder

log = logging.getLogger(__name__)


def lacking(settings: Settings, record: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the settings that a finished run has not fulfilled, and that require running it again.

    Args:
        settings: the requested settings, with the same run ID.
        record: the record of the finished run.
        folder: the folder of the finished run.
    """
    saved = RunFolder(folder).model.is_dir()
    fulfilled = {
        "figures.study": _studied(settings, record, folder),
        "save": saved or not settings.save,
        "sparsity_config": _described(folder) == settings.sparsity_config or not (saved and settings.save),
        "evaluation.images.sheet": _has_sheet(settings, record, folder),
        "evaluation.speed": _timed(settings, record),
    }
    return [name for name, done in fulfilled.items() if not done]


def supplement(
    record: dict[str, Any], settings: Settings, config: Mapping[str, Any], folder: Path, identity: Identity | None = None
) -> dict[str, Any]:
    """Draw the figures of a finished run and log it to the tracker, if the settings request this and the run lacks it.

    Args:
        config: the configuration of ``settings``.
        identity: the name of the run for the tracker; if None, its method, model and pattern.
    Returns:
        The run record, including the tracker of the run.
    """
    if settings.figures.draw and not _drawn(record, folder):
        draw_figures(record, folder)
    if not settings.tracking.active or is_tracked(settings.tracking, record, folder):
        return record
    log.info("logging the results of the finished run to %s, without pruning again", settings.tracking.kind)
    data = record | {"config": record["config"] | {"tracking": config["tracking"]}}
    identity = identity or Identity(f"{settings.label} {settings.model.name} {settings.sparsity.parsed}")
    tracker = FailSafeTracker(settings.tracking, SimpleNamespace(data=data, kept=True), identity, folder, settings.tags)
    for step, layer in enumerate(record["layers"]):
        tracker.log("layer", step, layer)
    tracker.log("results", record["metrics"], record["layers"])
    for path in sorted((folder / FOLDER).glob("*.png")):
        tracker.log("figure", path.stem, path)
    model = RunFolder(folder).model
    tracker.log("keep", RunFolder(folder).record, model if settings.tracking.save_model and model.exists() else None)
    tracker.finish(failed=False)
    write_record(RunFolder(folder).record, data)
    return data


def _studied(settings: Settings, record: Mapping[str, Any], folder: Path) -> bool:
    """Return whether all matching layers were studied. False if a pattern matches none: running again reports the error."""
    for pattern in settings.figures.study:
        layers = [layer for layer in record["layers"] if fnmatchcase(layer["name"], pattern)]
        pruned = [layer["name"] for layer in layers if not layer.get("fallback")]
        if not layers or not all((folder / FOLDER / f"{name}.json").is_file() for name in pruned):
            return False
    return True


def _described(folder: Path) -> bool:
    """Return whether the saved model's configuration describes its sparsity."""
    path = RunFolder(folder).model / "config.json"
    return path.is_file() and "quantization_config" in json.loads(path.read_text(encoding="utf-8"))


def _has_sheet(settings: Settings, record: Mapping[str, Any], folder: Path) -> bool:
    """Return whether the contact sheet has at least as many prompts as requested."""
    images = settings.evaluation.images
    if images is None or not images.sheet or not settings.pruned or not settings.figures.draw:
        return True
    before = complete(record["config"])
    drawn = before["evaluation.images.sheet"] if before["figures.draw"] else 0
    return (folder / FOLDER / SHEET).is_file() and drawn >= min(images.sheet, images.samples)


def _timed(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Return whether the speed was measured, or cannot be measured on this machine either."""
    if not any(within(name, "evaluation.speed") for name in effective(settings.model_dump(mode="json"))):
        return True
    measured = record["protocol"].get("speed")
    on_cuda = str(record["protocol"].get("device")).startswith("cuda")
    return bool(measured) and (not measured["not_measured"] or on_cuda or not torch.cuda.is_available())


def _drawn(record: Mapping[str, Any], folder: Path) -> bool:
    names = ["layers"] if record["layers"] else []
    names += [f"{path.stem}.{study}" for path in (folder / FOLDER).glob("*.json") for study in STUDIES]
    return all((folder / FOLDER / f"{name}.png").is_file() for name in names)
