"""The ``rose-exp-report`` command, which generates a report from run records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.exits import exit_on_signals, guarded_output  # every other import is slower, and a signal can interrupt it

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``report.md``, ``.csv``, ``.tex`` and ``.html``, and print the Markdown report."""
    exit_on_signals()
    with guarded_output():
        from ..runtime.output import redacted_output

        with redacted_output():
            _run(arguments)


def _run(arguments: Sequence[str] | None) -> None:
    import argparse
    import sys
    from pathlib import Path

    from ..report.conditions import SPARSITY
    from ..report.files import write_report
    from ..report.gather import BASELINE
    from ..runtime.errors import RoseExpError
    from ..runtime.escaping import terminal
    from ..tracking.record import FILE_NAME

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
    parser.add_argument(
        "--resolve",
        type=_relative,
        metavar="DIFFERENCE",
        help="state how many pairs of runs resolve this difference to the baseline, such as 0.05 for 5 %%, and how many "
        "evaluation windows resolve the measured one",
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.folders, options.output, options.columns, options.baseline, options.allow, options.resolve))
    except RoseExpError as error:
        print(terminal(str(error), lines=True), file=sys.stderr)
        sys.exit(1)


def _relative(text: str) -> float:
    """Parse a relative difference.

    Raises:
        ArgumentTypeError: it is not a number above -1 other than 0.
    """
    import argparse
    import math

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1 < value < math.inf or value == 0:
        raise argparse.ArgumentTypeError(f"expected a relative difference such as 0.05, got {text!r}")
    return value
