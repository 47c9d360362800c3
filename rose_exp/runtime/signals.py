"""Graceful shutdown on signals: the run finishes the current layer, saves its progress, and exits with :data:`EXIT_STATUS`."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .exits import DEFAULT_HANDLERS, exit_now, message

log = logging.getLogger(__name__)

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # schedulers send the last three before they kill a job
CLEANING_UP = 5.0  # seconds after a second Ctrl-C in which the run writes its record; later signals end the process


class Interrupted(BaseException):
    """A signal has stopped the run, which has saved its progress."""


class _Stop:
    """The signal that the process has received, if any.

    Attributes:
        left: the time since when the run only writes its record; None before that.
    """

    def __init__(self):
        self.signal: str | None = None
        self.left: float | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        if self.left is not None:
            if time.monotonic() > self.left + CLEANING_UP:
                exit_now(number)
            self.signal = self.signal or signal.Signals(number).name
            return
        if self.signal is not None and number == signal.SIGINT:
            self.left = time.monotonic()
            raise KeyboardInterrupt  # a second Ctrl-C stops the run immediately
        self.signal = signal.Signals(number).name
        message(f"{self.signal}: finishing the current layer, then stopping")


_stop = _Stop()


def stop_requested() -> bool:
    """Return whether a signal has requested the run to stop."""
    return _stop.signal is not None


def check() -> None:
    """Stop the run here if a signal has requested it.

    Raises:
        Interrupted: a signal has requested the run to stop.
    """
    if stop_requested():
        raise Interrupted(_stop.signal)


def leave() -> None:
    """Let signals interrupt nothing for a short time from now on, so that the record of a run is complete."""
    if _stop.left is None:
        _stop.left = time.monotonic()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Record signals while the body runs, instead of letting them kill the process.

    Does not replace existing handlers, such as that of submitit, which requeues a job in Slurm. Does nothing outside the main
    thread, which is the only one that can install handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (*DEFAULT_HANDLERS, exit_now):
            before[number] = signal.signal(number, _stop.note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop.signal = _stop.left = None
