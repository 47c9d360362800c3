"""Writes a report on the run records below some folders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.errors import RoseExpError
from ..runtime.escaping import terminal
from ..runtime.exits import signals_blocked
from ..runtime.files import write_text
from ..runtime.outside import outside_errors
from ..tracking.reading import values_of
from ..tracking.record import FILE_NAME
from .conditions import SPARSITY
from .gather import BASELINE, gather
from .page import sheets_of, studies_of, web_page
from .sheets import draw_sheet, sheets_of_runs
from .table import collect_records
from .text import comma_separated, latex, markdown

log = logging.getLogger(__name__)


def write_report(
    folders: Sequence[Path],
    output: Path | None = None,
    columns: str = SPARSITY,
    baseline: str = BASELINE,
    allowed: Sequence[str] = (),
    resolve: float | None = None,
) -> str:
    """Read the records below ``folders``, write the report to ``output``, and return it as Markdown.

    Skips damaged records with a warning.

    Raises:
        RoseExpError: a folder does not exist, no folder has a valid record, an option is wrong, or writing fails.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RoseExpError(f"DIR: expected a folder that exists, got {folder}")
    found = {path.resolve(): (path, record) for folder in folders for path, record in collect_records(folder)}
    runs = [(path, record) for path, record in found.values() if _usable(path, record)]
    if not runs:
        damaged = any(next(folder.rglob(FILE_NAME), None) is not None for folder in folders)
        expected = f"a {FILE_NAME} that is not damaged" if damaged else f"folders with {FILE_NAME} in them"
        raise RoseExpError(f"DIR: expected {expected}, got none in {', '.join(map(str, folders))}")
    report = gather([record for _, record in runs], columns, baseline, allowed, resolve)
    output = output or folders[0] / "report"
    text, runs_and_folders = markdown(report), [(path.parent, record) for path, record in runs]
    sheets = sheets_of_runs(runs_and_folders, columns)
    with outside_errors(f"cannot write to {output}"):
        paths = [draw_sheet(s.rows, s.prompts, output / f"contact_sheet_{i}.png") for i, s in enumerate(sheets, start=1)]
    shown = sheets_of(runs_and_folders, list(zip(sheets, paths, strict=True)))
    page = web_page(report, studies_of([folder for folder, _ in runs_and_folders]), shown)
    files = {"report.md": text, "report.csv": comma_separated(report), "report.tex": latex(report), "report.html": page}
    with signals_blocked():
        for name, content in files.items():
            write_text(output / name, content)
    names = [*files, *(path.name for path in paths)]
    return f"{text}\nwritten to {output.resolve()}: {', '.join(names)}"


def _usable(path: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a report of this record alone can be generated. If not, warn that its values are incomplete or wrong."""
    try:
        with values_of(path):
            report = gather([record])
            for generate in (markdown, comma_separated, latex):
                generate(report)
    except RoseExpError as error:
        log.warning("skipped: %s", terminal(str(error)))
        return False
    return True
