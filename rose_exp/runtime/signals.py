"""Graceful shutdown on signals: the run finishes the current layer, saves its progress, and exits with :data:`EXIT_STATUS`."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # schedulers send the last three before they kill a job


class Interrupted(BaseException):
    """A signal has stopped the run, which has saved its progress."""


class _Stop:
    """The signal that the process has received, if any."""

    def __init__(self):
        self.signal: str | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops the process immediately
        self.signal = signal.Signals(number).name
        log.warning("%s: finishing the current layer, then stopping", self.signal)


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
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, _stop.note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop.signal = None
