"""Contact sheets: images of a dense model above those of pruned models, from the same noise."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..runtime.escaping import figure_label, visible
from ..runtime.files import written
from .conditions import column_of, conditions, variant
from .figures import FOLDER, SHEET

log = logging.getLogger(__name__)

IMAGES = "images.safetensors"
INCHES = 1.9  # size of an image
LETTERS = 26  # maximum line length of prompts and labels
LARGEST = 256  # height and width of a stored image in pixels
ROWS = 12  # of a sheet

Images = NDArray[np.uint8]  # (images, height, width, channels)


@dataclass(frozen=True)
class Pictures:
    """Images of a dense and a pruned model from the same prompts and noise, as a run stores them for sheets of several runs."""

    dense: Images
    pruned: Images
    prompts: list[str]


@dataclass(frozen=True)
class Sheet:
    """Images of several runs with the same dense model, prompts and noise.

    Attributes:
        title: model, and the column of the report that the runs belong to.
        rows: images by name of the model, the dense model first.
        runs: IDs of the runs that it summarizes, also of those without a row.
    """

    title: str
    rows: dict[str, Images]
    prompts: list[str]
    runs: list[str]


def draw_sheet(rows: Mapping[str, Images], prompts: Sequence[str], path: Path) -> Path:
    """Write a PNG with one row per model and one column per prompt, and return its path."""
    count = len(prompts)
    figure = Figure(figsize=(INCHES * count + 0.5, INCHES * len(rows) + 0.9), dpi=130, layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, images) in enumerate(rows.items()):
        for column in range(count):
            place, image = axes[row][column], images[column]
            gray = image.shape[-1] == 1
            place.imshow(image[..., 0] if gray else image, cmap="gray" if gray else None, vmin=0, vmax=255)
            place.set_xticks([])
            place.set_yticks([])
            for edge in place.spines.values():
                edge.set_visible(False)
            if row == 0:
                place.set_title("\n".join(textwrap.wrap(figure_label(prompts[column]), LETTERS)[:3]), fontsize=7)
            if column == 0:
                place.set_ylabel("\n".join(textwrap.wrap(figure_label(name), LETTERS)), fontsize=8)
    with written(path) as place:
        figure.savefig(place, format="png")
    return path


def draw_run(pictures: Pictures, label: str, folder: Path) -> Path:
    """Draw the contact sheet of a run in its folder, store its images for sheets of several runs, and return its path."""
    with written(folder / FOLDER / IMAGES) as place:
        images = {"dense": _reduced(pictures.dense), "pruned": _reduced(pictures.pruned)}
        save_file(images, place, metadata={"prompts": json.dumps(pictures.prompts)})
    return draw_sheet({"Dense": pictures.dense, label: pictures.pruned}, pictures.prompts, folder / FOLDER / SHEET)


def _reduced(images: Images) -> Images:
    step = -(-max(images.shape[1:3]) // LARGEST)
    return np.ascontiguousarray(images[:, ::step, ::step])


def read_pictures(folder: Path) -> Pictures | None:
    """Read the images of a run, or return None if it has none. Damaged files are skipped with a warning."""
    path = folder / FOLDER / IMAGES
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            prompts = json.loads((file.metadata() or {})["prompts"])
            dense, pruned = file.get_tensor("dense"), file.get_tensor("pruned")
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("expected a list of prompts")
        if not prompts or any(images.ndim != 4 or images.dtype != np.uint8 for images in (dense, pruned)):
            raise ValueError("expected images")
        if dense.shape != pruned.shape or len(dense) != len(prompts):
            raise ValueError("expected equally many images of equal size")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        log.warning("skipped: the images in %s are damaged (%s)", visible(str(path)), visible(str(error)))
        return None
    return Pictures(dense, pruned, prompts)


def sheets_of_runs(runs: Sequence[tuple[Path, Mapping[str, Any]]], columns: str) -> list[Sheet]:
    """Collect the images of runs that differ only in how the model is pruned.

    Each pair of model and column of the report with at least two pruned models has a sheet. Of runs with several seeds, the
    smallest one is shown, and at most :data:`ROWS` rows. Rows with equal labels and different options contain the run ID.
    """
    groups: dict[str, Sheet] = {}
    drawn: set[tuple[str, str]] = set()
    for folder, record in sorted(runs, key=lambda run: (run[1]["config"]["seed"], run[1]["started"])):
        pictures = read_pictures(folder)
        if pictures is None:
            continue
        name, column = record["protocol"]["model"]["name"], column_of(record, columns)
        key = json.dumps([name, column, pictures.prompts, conditions(record, "images.psnr", columns)], default=str)
        sheet = groups.setdefault(key, Sheet(f"{name}, {column}", {"Dense": pictures.dense}, pictures.prompts, []))
        row = (key, json.dumps(variant(record, columns), sort_keys=True, default=str))
        if row not in drawn and len(sheet.rows) < ROWS:
            label = record["label"]
            sheet.rows[f"{label} ({record['run_id']})" if label in sheet.rows else label] = pictures.pruned
            drawn.add(row)
        if row in drawn:
            sheet.runs.append(record["run_id"])
    return [sheet for sheet in groups.values() if len(sheet.rows) > 2]
