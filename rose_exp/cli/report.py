"""The ``rose-exp-report`` command, which generates a report from run records."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report.conditions import SPARSITY
from ..report.gather import BASELINE, gather
from ..report.page import sheets_of, studies_of, web_page
from ..report.table import collect_records
from ..report.text import comma_separated, latex, markdown
from ..runtime.errors import RoseExpError
from ..runtime.escaping import terminal
from ..runtime.output import redacted_output
from ..tracking.reading import values_of
from ..tracking.record import FILE_NAME, write_atomically

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``report.md``, ``.csv``, ``.tex`` and ``.html``, and print the Markdown report."""
    with redacted_output():
        _main(arguments)


def _main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="rose-exp-report",
        description="Generate tables of run records: methods × sparsities, over paired seeds, with published values.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=f"folders to search for {FILE_NAME}")
    parser.add_argument("--output", type=Path, help="output folder (default: DIR/report)")
    parser.add_argument(
        "--columns", default=SPARSITY, help="setting whose values are the columns, for example engine.block_size"
    )
    parser.add_argument("--baseline", default=BASELINE, help="reference method for differences (default: %(default)s)")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="SETTING", help="allow runs that differ in SETTING in one table"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.folders, options.output, options.columns, options.baseline, options.allow))
    except RoseExpError as error:
        print(terminal(str(error), lines=True), file=sys.stderr)
        sys.exit(1)


def write_report(
    folders: Sequence[Path],
    output: Path | None = None,
    columns: str = SPARSITY,
    baseline: str = BASELINE,
    allowed: Sequence[str] = (),
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
    report = gather([record for _, record in runs], columns, baseline, allowed)
    output = output or folders[0] / "report"
    text = markdown(report)
    write_atomically(output / "report.md", text)
    write_atomically(output / "report.csv", comma_separated(report))
    write_atomically(output / "report.tex", latex(report))
    sheets = sheets_of([(path.parent, record) for path, record in runs])
    write_atomically(output / "report.html", web_page(report, studies_of([path.parent for path, _ in runs]), sheets))
    return f"{text}\nwritten to {output.resolve()}: report.md, report.csv, report.tex, report.html"


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
