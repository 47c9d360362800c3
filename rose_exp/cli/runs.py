"""The ``rose-exp-runs`` command, which lists, shows and compares runs, and copies their settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.exits import exit_on_signals, guarded_output  # every other import is slower, and a signal can interrupt it

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

FILTERS = {
    "method": "label or name, such as ROSE or wanda",
    "model": "name",
    "sparsity": "such as 0.7 or 2:4",
    "tag": "one of the tags",
    "status": "finished, failed, interrupted or running",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Execute a subcommand and print its result."""
    exit_on_signals()
    with guarded_output():
        from ..runtime.output import redacted_output

        with redacted_output():
            _run(arguments)


def _run(arguments: Sequence[str] | None) -> None:
    import sys

    from ..runtime.errors import RoseExpError
    from ..runtime.escaping import terminal

    options = _parser().parse_args(arguments)
    try:
        print(_result(options))
    except RoseExpError as error:
        print(terminal(str(error), lines=True), file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(
        prog="rose-exp-runs",
        description="List, show and compare runs. RUN is a run ID, the start of one, or the folder of a run. "
        "rose-exp-clean removes unfinished runs, and rose-exp-report makes tables.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--in", dest="folders", action="append", type=Path, metavar="DIR", help="folder with runs (outputs)")
    listing = commands.add_parser("list", parents=[folder], help="list runs, newest first")
    for name, described in FILTERS.items():
        listing.add_argument(
            f"--{name}", metavar="PATTERN", help=f"only runs with this {name}: {described}; * matches any text"
        )
    listing.add_argument("--last", type=_count, metavar="N", help="only the newest N runs")
    commands.add_parser("show", parents=[folder], help="show a run").add_argument("run", metavar="RUN")
    comparing = commands.add_parser("compare", parents=[folder], help="show how two runs differ")
    comparing.add_argument("run", metavar="RUN")
    comparing.add_argument("other", metavar="RUN")
    copying = commands.add_parser("copy", parents=[folder], help="copy the settings of a run to a file for editing")
    copying.add_argument("run", metavar="RUN")
    copying.add_argument("file", metavar="FILE", type=Path, help="a new .yaml file")
    return parser


def _result(options: argparse.Namespace) -> str:
    """Execute the subcommand and return its output.

    Raises:
        RoseExpError: an argument is wrong, or a file cannot be written.
    """
    from pathlib import Path

    from ..report import runs as of_runs

    folders = options.folders or [Path("outputs")]
    if options.command == "list":
        filters = {name: value for name in FILTERS if (value := getattr(options, name)) is not None}
        return of_runs.list_of(of_runs.select(of_runs.find_runs(folders), filters)[: options.last])
    run = of_runs.find_run(options.run, folders)
    if options.command == "show":
        return of_runs.describe(run)
    if options.command == "compare":
        return of_runs.compare(run, of_runs.find_run(options.other, folders))
    import shlex

    from omegaconf import OmegaConf

    from .paths import config_folder

    hydra = OmegaConf.to_container(OmegaConf.load(config_folder() / "config.yaml").hydra)
    of_runs.copy_config(run, options.file, hydra)
    place = options.file.resolve()
    return shlex.join(["rose-exp", "--config-dir", str(place.parent), "--config-name", place.stem])


def _count(text: str) -> int:
    """Parse a number of runs.

    Raises:
        ArgumentTypeError: it is not an integer of at least 1.
    """
    import argparse

    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
