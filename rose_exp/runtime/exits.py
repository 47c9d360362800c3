"""How a command ends if a signal arrives or its output is closed: with a short message and the usual status, no traceback.

Commands import this module before anything slow, so it needs little of the standard library. Runs replace the handlers while
they work, see :mod:`rose_exp.runtime.signals`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

DEFAULT_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)
CLOSED_OUTPUT_STATUS = 128 + signal.SIGPIPE

cleanups: list[Callable[[], Any]] = []
"""Functions that a signal calls before it ends the process."""


class OutputClosed(BaseException):
    """The reader of the standard output has gone, as in ``rose-exp --help | head``, or the output cannot be written."""

    def __init__(self, reason: OSError):
        broken = isinstance(reason, BrokenPipeError)
        super().__init__("the output was closed" if broken else f"cannot write the output: {reason.strerror or reason}")
        self.status = CLOSED_OUTPUT_STATUS if broken else 1


def exit_on_signals() -> None:
    """Let SIGINT and SIGTERM end the process with a message. Does not replace other handlers, or signals that are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in DEFAULT_HANDLERS:
            signal.signal(number, exit_now)


def exit_now(number: int, _frame: FrameType | None = None) -> None:
    """End the process at once, and the workers that it has started. Runs in workers stop as after SIGTERM."""
    try:
        for cleanup in cleanups:
            cleanup()
        if "multiprocessing" in sys.modules:
            for child in sys.modules["multiprocessing"].active_children():
                child.terminate()
    finally:
        message(f"stopped by {signal.Signals(number).name}")
        os._exit(128 + number)  # an exception could be raised, and lost, anywhere


def is_orphan(parent: int, patience: float = 1.0) -> bool:
    """Return whether the parent process has ended, or ends within ``patience`` seconds.

    Args:
        parent: process ID of the parent when this process started.
    """
    end = time.monotonic() + patience
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.02)
    return os.getppid() != parent


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Deliver signals after the body, which must be short, so that it is executed as a whole or not at all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def message(text: str) -> None:
    """Write a line to standard error, also from a signal handler, which must not use the buffered stream."""
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        return  # nobody reads it


class _Output:
    """Standard output, of which a failed write raises :class:`OutputClosed`, which no library catches by accident."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._checked(self._stream.write, text)

    def writelines(self, lines: Any) -> None:
        self._checked(self._stream.writelines, lines)

    def flush(self) -> None:
        self._checked(self._stream.flush)

    def _checked(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:  # what is buffered is written at exit
                os.dup2(nowhere.fileno(), self._stream.fileno())
            raise OutputClosed(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_output() -> Iterator[None]:
    """End the command with a message and the usual status if its standard output fails while the body runs."""
    before = sys.stdout
    sys.stdout = _Output(before) if before is not None else None
    try:
        yield
        if before is not None:
            sys.stdout.flush()
    except OutputClosed as error:
        if error.status != CLOSED_OUTPUT_STATUS:
            message(str(error))
        sys.exit(error.status)
    finally:
        sys.stdout = before
