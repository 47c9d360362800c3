"""Errors that the user can fix. The commands print them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .redaction import redacted


class RoseExpError(Exception):
    """An error outside the code: in a setting, a file, a download or a disk. The message names it, without secrets."""

    def __init__(self, message: str = ""):
        printable = message.encode(errors="backslashreplace").decode()  # lone surrogates cannot be printed
        super().__init__(redacted(printable))


class SettingsError(RoseExpError):
    """Errors in the configuration. The message lists all of them."""

    def __init__(self, problems: list[str]):
        self.problems = [redacted(problem) for problem in problems]
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  * {problem}" for problem in self.problems)]))


def suggest(wrong: object, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` with the most similar known name, or an empty string if none is similar.

    A name with the same characters in another order, such as 2:4 for 4:2, comes first.
    """
    names = list(known)
    near = [name for name in names if sorted(name) == sorted(str(wrong))] or difflib.get_close_matches(str(wrong), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
