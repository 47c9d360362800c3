"""The report as one self-contained web page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..runtime.escaping import figure_label, visible
from .conditions import SPARSITY, column_of
from .figures import COLOURS, DPI, FOLDER, MARKERS, SHEET, STUDIES, legend_below, read_studies
from .gather import DESCRIPTIVE, Report, Table
from .sheets import Sheet
from .text import NOTHING, blocks, caption, notes


def studies_of(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the layer studies in the folders of runs."""
    return [study for folder in folders for study in read_studies(folder)]


def sheets_of(runs: Sequence[tuple[Path, Mapping[str, Any]]], drawn: Sequence[tuple[Sheet, Path]] = ()) -> list[dict[str, str]]:
    """Read contact sheets, each with a title and the image as a data URL.

    Args:
        drawn: sheets of several runs, with their files. The sheets of these runs alone are left out.
    """
    sheets = [{"title": sheet.title, "image": _data_url(path)} for sheet, path in drawn]
    shown = {run for sheet, _ in drawn for run in sheet.runs}
    for folder, record in runs:
        if record["run_id"] in shown:
            continue
        path = folder / FOLDER / SHEET
        if path.is_file():
            title = (
                f"{record['protocol']['model']['name']}: {record['label']}, {column_of(record, SPARSITY)}, {record['run_id']}"
            )
            sheets.append({"title": title, "image": _data_url(path)})
    return sheets


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def web_page(report: Report, studies: Sequence[dict[str, Any]] = (), sheets: Sequence[dict[str, str]] = ()) -> str:
    """Return the report as HTML with embedded style and figures, without external resources."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_visible).from_string(template)
    return page.render(
        report=report,
        tables=[_table_context(report, table) for table in report.tables],
        sheets=sheets,
        studies=[{"layer": s["layer"], "figures": [_embedded(draw(s)) for draw in STUDIES.values()]} for s in studies],
    )


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def _table_context(report: Report, table: Table) -> dict[str, Any]:
    shown = []
    for heading, show in blocks(report, table):
        rows = [
            (
                name,
                [
                    (show(cells[c]) if c in cells else NOTHING, c in cells and cells[c].best and not heading)
                    for c in table.names
                ],
            )
            for name, cells in table.cells.items()
        ]
        if heading:
            rows = [(name, cells) for name, cells in rows if any(text != NOTHING for text, _ in cells)]
        shown.append({"heading": heading, "rows": rows})
    figures = [_embedded(figure) for figure in _figures(report, table)]
    return {"table": table, "caption": caption(table), "blocks": shown, "notes": notes(table), "figures": figures}


def _figures(report: Report, table: Table) -> list[Figure]:
    """Draw the values of a table over its columns, and the differences to the baseline with their intervals."""
    if table.metric in ("zero_shot", *DESCRIPTIVE):
        return []
    figures = [values_figure(table)] if len(table.names) > 1 else []
    if any(cell.difference and cell.difference.low is not None for row in table.cells.values() for cell in row.values()):
        figures.append(differences_figure(report, table))
    return figures


def values_figure(table: Table) -> Figure:
    """Plot mean and standard deviation of every method over the columns."""
    figure = Figure(figsize=(6.4, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for i, (row, cells) in enumerate(table.cells.items()):
        places = [x for x, name in enumerate(table.names) if name in cells]
        means = [cells[table.names[x]].mean for x in places]
        spreads = [cells[table.names[x]].deviation or 0 for x in places]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ms": 5, "lw": 1.4, "capsize": 3}
        axes.errorbar(places, means, spreads, label=figure_label(row), ls="--" if row == "Dense" else "-", **style)
    values = [cell.mean for row in table.cells.values() for cell in row.values()]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_xticks(range(len(table.names)), list(map(figure_label, table.names)))
    axes.set(xlabel=figure_label(table.columns), ylabel=figure_label(table.metric))
    axes.margins(x=0.08, y=0.08)
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return figure


def differences_figure(report: Report, table: Table) -> Figure:
    """Plot relative differences to the baseline with 95 % confidence intervals."""
    figure = Figure(figsize=(6.4, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    rows = [
        row for row, cells in table.cells.items() if any(c.difference and c.difference.low is not None for c in cells.values())
    ]
    for i, row in enumerate(rows):
        points = [(x, table.cells[row][n].difference) for x, n in enumerate(table.names) if n in table.cells[row]]
        points = [(x, d) for x, d in points if d is not None and d.low is not None]
        scale = [100 * d.relative / d.mean if d.mean else 0 for _, d in points]
        places = [x + (i - (len(rows) - 1) / 2) * 0.12 for x, _ in points]
        halves = [(d.high - d.low) / 2 * s for (_, d), s in zip(points, scale, strict=True)]
        look = list(table.cells).index(row)  # the same style as in the figure of the values
        style = {"color": COLOURS[look % len(COLOURS)], "marker": MARKERS[look % len(MARKERS)], "ms": 5, "ls": "", "capsize": 3}
        axes.errorbar(places, [100 * d.relative for _, d in points], [abs(h) for h in halves], label=figure_label(row), **style)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xticks(range(len(table.names)), list(map(figure_label, table.names)))
    axes.set(xlabel=figure_label(table.columns), ylabel=figure_label(f"% of {report.baseline}, 95 % interval"))
    axes.margins(x=0.08, y=0.08)
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return figure


def _embedded(figure: Figure) -> str:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
