"""The boundary to files that others wrote and to the libraries that read them.

A damaged file makes a library raise an error of any class: TypeError, IndexError, a plain Exception from Rust, and so on.
:func:`outside_errors` turns each of them into one :class:`RoseExpError`, which names the setting, the file and the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .errors import RoseExpError

PACKAGE = __name__.partition(".")[0]
UNCLEAR = (LookupError, TypeError, AttributeError, AssertionError, NotImplementedError)
"""Errors whose message makes no sense without the name of their class."""

COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")  # parts of the body with a frame of their own
MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@contextmanager
def outside_errors(where: str, hint: str = "") -> Iterator[None]:
    """Raise every error of a library or the operating system in the body as a :class:`RoseExpError`.

    An error of this package keeps its traceback, also if a library has called the package: it is a bug, not a damaged file. The
    body should call the library and do nothing else.

    Args:
        where: the start of the message: the name of the setting, and what the body does with which file.
        hint: the end of the message, after the reason.
    """
    try:
        yield
    except RoseExpError:
        raise
    except BaseException as error:
        if not _from_outside(error):
            raise
        raise RoseExpError(f"{where}: {reason(error)}{hint}") from error


def _from_outside(error: BaseException) -> bool:
    """Return whether no code below the body of :func:`outside_errors` belongs to this package."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":  # a panic of a library in Rust
        return False
    below = list(_frames(error.__traceback__))[2:]  # without outside_errors and the body
    return not any(_is_own(frame) and frame.f_code.co_name not in COMPREHENSIONS for frame in below)


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE


def reason(error: BaseException, limit: int = 300) -> str:
    """Return the message of an error and of its first cause as one line of limited length."""
    text, first = _line(error), error
    while first.__cause__ is not None:
        first = first.__cause__
    if _line(first) not in text:
        text = f"{text[: limit // 2]} ({_line(first)})"
    return text if len(text) <= limit else f"{text[:limit]} …"


def _line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}".removesuffix(": ") if isinstance(error, UNCLEAR) or not text else text


def read_text(path: Path, where: str) -> str:
    """Return the content of a UTF-8 text file, without a byte order mark.

    Raises:
        RoseExpError: the file is unreadable, not UTF-8, or contains NUL, which no text does.
    """
    with outside_errors(f"{where}: cannot read {path}"):
        content = path.read_bytes()
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            raise RoseExpError(f"{where}: expected UTF-8 text in {path}, got {encoding}")
    with outside_errors(f"{where}: expected UTF-8 text in {path}"):
        text = content.decode("utf-8-sig")
    if "\0" in text:
        raise RoseExpError(f"{where}: expected UTF-8 text in {path}, got a NUL character (UTF-16 or a binary file?)")
    return text


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text.

    Args:
        where: the start of the message: the name of the setting, and what is expected in which file.

    Raises:
        RoseExpError: the text is not JSON, nested too deeply, or repeats a key, of which all values but one would be ignored.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise RoseExpError(f"{where}: the key {repeated!r} occurs twice in one object")
        return data

    with outside_errors(where):
        return json.loads(text, object_pairs_hook=unique)


def read_json_object(path: Path, where: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RoseExpError: as for :func:`read_text` and :func:`parse_json`, or the file contains another JSON value.
    """
    data = parse_json(read_text(path, where), f"{where}: expected a JSON object in {path}")
    if not isinstance(data, dict):
        raise RoseExpError(f"{where}: expected a JSON object in {path}, got {type(data).__name__}")
    return data
