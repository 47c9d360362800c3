"""Redaction of secrets, and escaping of control characters, in the output streams and logs of a command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from .escaping import terminal
from .redaction import redacted


class RedactingStream:
    """A text stream that redacts secrets in everything that is written to it.

    Libraries that capture the output, such as W&B, replace ``write``. They, too, receive redacted text.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._target: Callable[[str], Any] = stream.write

    @property
    def write(self) -> Callable[[str], Any]:
        target = self._target  # not read when called, because a replacement of ``write`` calls what it has replaced
        return lambda text: target(redacted(text))

    @write.setter
    def write(self, target: Callable[[str], Any]) -> None:
        self._target = target

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def redacted_output() -> Iterator[None]:
    """Redact secrets in the standard output and the standard error while the body runs."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (s if isinstance(s, RedactingStream) else RedactingStream(s) for s in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Redacting(logging.Filter):
    """Redacts secrets and escapes control characters in log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        clean = terminal(redacted(text), lines=True)
        if clean != text:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_text is None:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = terminal(redacted(record.exc_text), lines=True)
        if record.stack_info:
            record.stack_info = terminal(redacted(record.stack_info), lines=True)
        return True


def guard_logs() -> None:
    """Add the redaction of secrets to all current handlers of the root logger."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, Redacting) for known in handler.filters):
            handler.addFilter(Redacting())
