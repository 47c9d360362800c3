"""Errors that are the user's to mend: shown as they read, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RoseExpError(Exception):
    """Something outside the code is wrong: a setting, a file, a download, a disk. The message says what and where."""


class SettingsError(RoseExpError):
    """The configuration has mistakes, all of them listed."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  * {problem}" for problem in problems)]))


def suggest(wrong: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the known name nearest to the wrong one, or nothing where none is near."""
    near = difflib.get_close_matches(str(wrong), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
