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
from ..tracking import Identity, Trackers, entries, read_record, untracked
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
    """Draw the figures of a finished run and log it to trackers, if the settings request this and the run lacks it.

    Args:
        config: the configuration of ``settings``.
        identity: the name of the run for trackers; if None, its method, model and pattern.
    Returns:
        The run record, including the trackers of the run.
    """
    if settings.figures.draw and not _drawn(record, folder):
        draw_figures(record, folder)
    names = untracked(settings.tracking, record, folder)
    if not names:
        return record
    log.info("logging the results of the finished run to %s, without pruning again", ", ".join(names))
    data = record | {"config": record["config"] | {"tracking": config["tracking"]}}
    trackers = Trackers(settings, SimpleNamespace(data=data, kept=True), folder, identity, names)
    for step, layer in enumerate(record["layers"]):
        trackers.log("layer", step, layer)
    trackers.log("results", record["metrics"], record["layers"])
    for path in sorted((folder / FOLDER).glob("*.png")):
        trackers.log("figure", path.stem, path)
    model = RunFolder(folder).model
    trackers.log("keep", RunFolder(folder).record, model if model.exists() else None)
    trackers.finish(failed=False)
    write_record(RunFolder(folder).record, data)
    return data


def interrupted_trackers(settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """Return the entries of the trackers in the record of a run that was not finished, which the next process continues.

    Returns:
        An empty list if the folder has no such run, or if ``rerun`` discards it.
    """
    path = RunFolder(folder).record
    if settings.rerun or not path.exists():
        return []
    record = read_record(path)
    return entries(record) if record["status"] != "finished" else []


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
