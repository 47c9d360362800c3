"""Writes a report on the run records below some folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runtime.errors import RoseExpError
from ..runtime.exits import signals_blocked
from ..tracking.record import FILE_NAME, write_atomically
from .conditions import SPARSITY
from .gather import BASELINE, gather
from .page import sheets_of, studies_of, web_page
from .table import collect_records
from .text import comma_separated, latex, markdown


def write_report(
    folders: Sequence[Path],
    output: Path | None = None,
    columns: str = SPARSITY,
    baseline: str = BASELINE,
    allowed: Sequence[str] = (),
) -> str:
    """Read the records below ``folders``, write the report to ``output``, and return it as Markdown.

    Raises:
        RoseExpError: a folder does not exist, no folder has a record, a record is unreadable, or writing fails.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RoseExpError(f"DIR: expected a folder that exists, got {folder}")
    runs = list({path.resolve(): (path, record) for folder in folders for path, record in collect_records(folder)}.values())
    if not runs:
        raise RoseExpError(f"DIR: expected folders with {FILE_NAME} in them, got none in {', '.join(map(str, folders))}")
    report = gather([record for _, record in runs], columns, baseline, allowed)
    output = output or folders[0] / "report"
    text, runs_and_folders = markdown(report), [(path.parent, record) for path, record in runs]
    page = web_page(report, studies_of([folder for folder, _ in runs_and_folders]), sheets_of(runs_and_folders))
    files = {"report.md": text, "report.csv": comma_separated(report), "report.tex": latex(report), "report.html": page}
    with signals_blocked():
        for name, content in files.items():
            write_atomically(output / name, content)
    return f"{text}\nwritten to {output.resolve()}: {', '.join(files)}"
