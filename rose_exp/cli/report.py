"""The ``rose-exp-report`` command, which generates a report from run records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..report.conditions import SPARSITY
from ..report.gather import BASELINE, gather
from ..report.page import sheets_of, studies_of, web_page
from ..report.table import collect_records
from ..report.text import comma_separated, latex, markdown
from ..runtime.errors import RoseExpError
from ..runtime.files import write_text
from ..tracking.record import FILE_NAME


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``report.md``, ``.csv``, ``.tex`` and ``.html``, and print the Markdown report."""
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
        print(error, file=sys.stderr)
        sys.exit(1)


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
    text = markdown(report)
    write_text(output / "report.md", text)
    write_text(output / "report.csv", comma_separated(report))
    write_text(output / "report.tex", latex(report))
    sheets = sheets_of([(path.parent, record) for path, record in runs])
    write_text(output / "report.html", web_page(report, studies_of([path.parent for path, _ in runs]), sheets))
    return f"{text}\nwritten to {output.resolve()}: report.md, report.csv, report.tex, report.html"
