"""Draw the figures of a run as PNG files, from its record and its layer studies."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, model_validator

from ..runtime.errors import RoseExpError
from ..runtime.escaping import figure_label, visible
from ..runtime.files import write_text, written

log = logging.getLogger(__name__)

FOLDER = "figures"
SHEET = "contact_sheet.png"  # written by diffusion runs
DPI = 150
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # a palette safe for colour blindness
MARKERS = "osD^vP*X"


Errors = Annotated[list[FiniteFloat], Field(min_length=1)]


class _Study(BaseModel):
    """What the figures show of a layer study."""

    model_config = ConfigDict(strict=True)

    layer: str
    sparsity: str
    worst: int
    rows: PositiveInt
    columns: PositiveInt
    moved: Errors
    cumulative: Annotated[dict[str, Errors], Field(min_length=1, max_length=len(COLOURS))]
    heat: Annotated[dict[str, Annotated[list[Errors], Field(min_length=1)]], Field(min_length=2, max_length=2)]
    reorderings: Annotated[
        dict[str, Annotated[dict[str, dict[str, FiniteFloat]], Field(min_length=1, max_length=len(COLOURS))]],
        Field(min_length=2, max_length=2),
    ]

    @model_validator(mode="after")
    def _check(self) -> _Study:
        if any(len({len(row) for row in heat}) != 1 for heat in self.heat.values()):
            raise ValueError("heat: expected rows of equal length")
        for kinds in self.reorderings.values():
            ratios = {tuple(errors) for errors in kinds.values()}
            if len(ratios) != 1 or not ratios.pop() or not all(map(_is_number, next(iter(kinds.values())))):
                raise ValueError("reorderings: expected errors at equal sparsities")
        return self


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def write_study(folder: Path, name: str, study: Mapping[str, Any]) -> Path:
    """Save the results of a study of the layer ``name`` for later drawing, and return the path."""
    path = folder / FOLDER / f"{name}.json"
    write_text(path, json.dumps({"layer": name, **study}) + "\n")
    return path


def read_studies(folder: Path) -> list[dict[str, Any]]:
    """Read the layer studies in a run's folder. Skip damaged ones with a warning."""
    studies = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            study = json.loads(path.read_text(encoding="utf-8"))
            _Study.model_validate(study)
        except (OSError, ValueError, RecursionError) as error:
            reason = visible(str(error).partition("\n")[0])
            log.warning("skipped: %s is not a layer study (%s); delete it and run the run again", visible(str(path)), reason)
        else:
            studies.append(study)
    return studies


def draw_figures(record: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw all figures that a run's folder has data for, and return their paths by name."""
    figures: dict[str, Figure] = {}
    if record["layers"]:
        figures["layers"] = layers_figure(record)
    for study in read_studies(folder):
        for name, draw in STUDIES.items():
            figures[f"{study['layer']}.{name}"] = draw(study)
    return {name: _save(figure, folder / FOLDER / f"{name}.png") for name, figure in figures.items()}


def _save(figure: Figure, path: Path) -> Path:
    try:
        with written(path) as place:
            FigureCanvasAgg(figure).print_png(str(place))
    except OSError as error:
        raise RoseExpError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def legend_below(figure: Figure, axes: Axes, **options: Any) -> None:
    """Add a legend of the axes below all axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    entry = 0.5 + 0.07 * max(map(len, labels), default=0)  # inches of the longest one, at font size 8
    columns = max(1, min(len(labels), int(figure.get_figwidth() / entry)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, **options)


def layers_figure(record: Mapping[str, Any]) -> Figure:
    """Plot relative error and relative range of the layers over the blocks, with one line per kind of layer."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for layer in record["layers"]:
        numbers = [part for part in layer["name"].split(".") if part.isdigit()]
        kinds.setdefault(layer["name"].rsplit(".", 1)[-1], []).append((int(numbers[0]) if numbers else 0, layer))
    for i, (kind, layers) in enumerate(kinds.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ms": 3, "lw": 1}
        style["label"] = figure_label(kind)
        blocks = [block for block, _ in layers]
        left.plot(blocks, [layer["error"] for _, layer in layers], **style)
        right.plot(blocks, [layer["relative_range"] for _, layer in layers], **style)
    if all(layer["error"] > 0 for layer in record["layers"]):
        left.set_yscale("log")
    threshold = record["config"]["reorder"]["threshold"]
    if threshold is not None:
        right.axhline(threshold, color="black", lw=0.8, ls="--", label=f"threshold {threshold:g}")
    right.set_ylim(-0.04, 1.04)
    left.set(xlabel="transformer block", ylabel="relative error of the layer's output", title="error after pruning")
    right.set(xlabel="transformer block", ylabel="relative range of the column blocks", title="columnar pattern")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    legend_below(figure, right)
    title = f"{record['label']}, {record['protocol']['model']['name']}, {_pattern(record)}"
    figure.suptitle(figure_label(title), fontsize=10)
    return figure


def _pattern(record: Mapping[str, Any]) -> str:
    sparsity = record["config"]["sparsity"]
    return sparsity["pattern"] if sparsity["ratio"] is None else f"{sparsity['ratio']:.0%} {sparsity['pattern']}"


def orders_figure(study: Mapping[str, Any]) -> Figure:
    """Plot the cumulative error over pruned column blocks for several orders, and the error by position of the costliest one.

    Corresponds to Fig. 1a and 1c of the ROSE paper.
    """
    figure = Figure(figsize=(9, 3.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, errors) in enumerate(study["cumulative"].items()):
        style = {"color": COLOURS[i], "marker": MARKERS[i], "ms": 3, "lw": 1.2, "label": figure_label(name)}
        left.plot(range(1, len(errors) + 1), errors, **style)
    left.set(xlabel="column blocks pruned", ylabel="cumulative relative error (damped)", title="order of all column blocks")
    left.legend(fontsize=8, loc="upper left")
    right.plot(range(1, len(study["moved"]) + 1), study["moved"], color=COLOURS[0], marker="o", ms=3, lw=1.2)
    original = study["worst"] + 1
    right.axvline(original, color="black", lw=0.8, ls="--", label=f"original position {original}")
    right.set(xlabel="position of the costliest column block", ylabel="relative error", title="one column block moved")
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
        axes.grid(alpha=0.3)
    figure.suptitle(figure_label(f"{study['layer']}, {study['sparsity']}"), fontsize=10)
    return figure


def heat_figure(study: Mapping[str, Any]) -> Figure:
    """Plot the magnitudes of the weights in natural and in pruning order, as in Fig. 1b of the ROSE paper."""
    figure = Figure(figsize=(9, 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    heats = study["heat"]
    largest = max(max(row) for heat in heats.values() for row in heat)
    image = None
    for axes, (name, heat) in zip(panels, heats.items(), strict=True):
        extent = (0, study["columns"], study["rows"], 0)
        image = axes.imshow(heat, aspect="auto", cmap="viridis", vmin=0, vmax=largest, extent=extent, interpolation="nearest")
        axes.set(xlabel=figure_label(f"input channel, {name} order"))
    panels[0].set(ylabel="output channel")
    figure.colorbar(image, ax=panels, label="mean |W| of a cell")
    figure.suptitle(figure_label(study["layer"]), fontsize=10)
    return figure


def reorderings_figure(study: Mapping[str, Any]) -> Figure:
    """Plot the relative error of four reorderings, descending and ascending, as in Fig. 4 of the ROSE paper."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (direction, kinds) in zip(panels, study["reorderings"].items(), strict=True):
        width = 0.8 / len(kinds)
        for i, (kind, errors) in enumerate(kinds.items()):
            places = [x + (i - (len(kinds) - 1) / 2) * width for x in range(len(errors))]
            axes.bar(places, list(errors.values()), width, color=COLOURS[i], label=figure_label(kind))
        axes.set_xticks(range(len(errors)), [f"{float(ratio):.0%}" for ratio in errors])
        axes.set(xlabel="unstructured sparsity", title=figure_label(f"{direction} by expected loss"))
        axes.grid(alpha=0.3, axis="y")
    panels[0].set(ylabel="relative error of the layer's output")
    legend_below(figure, panels[0], title="reordered")
    figure.suptitle(figure_label(study["layer"]), fontsize=10)
    return figure


STUDIES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "orders": orders_figure,
    "weights": heat_figure,
    "reorderings": reorderings_figure,
}
