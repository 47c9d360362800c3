"""The ``rose-exp-clean`` command, which removes what killed and interrupted runs left behind."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runtime.errors import RoseExpError


def main(arguments: Sequence[str] | None = None) -> None:
    """List the leftovers below folders with their sizes, and remove them."""
    parser = argparse.ArgumentParser(
        prog="rose-exp-clean",
        description="Remove what killed and interrupted runs left behind: temporary files, and the states of finished runs. "
        "Results of finished runs, runs in progress and other files are never removed.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders to search, such as outputs")
    parser.add_argument("--dry-run", action="store_true", help="list what would be removed")
    parser.add_argument(
        "--unfinished", action="store_true", help="also remove unfinished runs and the states from which they could resume"
    )
    options = parser.parse_args(arguments)
    try:
        print(clean_folders(options.folders, options.unfinished, options.dry_run))
    except RoseExpError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def clean_folders(folders: Sequence[Path], unfinished: bool = False, dry_run: bool = False) -> str:
    """Remove the leftovers below ``folders``, and return a list of them.

    Raises:
        RoseExpError: a folder does not exist, or a file cannot be removed.
    """
    from ..runs.leftovers import find, remove_all  # slow to import

    for folder in folders:
        if not folder.is_dir():
            raise RoseExpError(f"DIR: expected a folder that exists, got {folder}")
    lines, remarks, leftovers, total = [], [], [], 0
    for folder in dict.fromkeys(path.resolve() for path in folders):
        found, skipped = find(folder, unfinished)
        remarks += skipped
        for leftover in found:
            if any(leftover.path == other.path for other in leftovers):
                continue
            size = leftover.size
            total += size
            leftovers.append(leftover)
            lines.append(f"{_shown(size):>10}  {leftover.path}: {leftover.what}")
    if not dry_run:
        remarks += remove_all(leftovers)
    action = "would remove" if dry_run else "removed"
    count = f"{len(leftovers)} leftover{'' if len(leftovers) == 1 else 's'}"
    return "\n".join([*lines, *dict.fromkeys(remarks), f"{action} {count}, {_shown(total)}"])


def _shown(size: int) -> str:
    """Return a size in bytes with a unit."""
    number, units = float(size), ["bytes", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.0f} {units[0]}" if units[0] == "bytes" else f"{number:.1f} {units[0]}"
