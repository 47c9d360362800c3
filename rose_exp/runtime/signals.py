"""Stopping a run from outside: a signal is noted, the layer at hand is finished, what is done is kept, and the process ends
with a status of its own."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # the last three: what schedulers announce the end with


class Interrupted(BaseException):
    """A run was told to stop, and has kept what it had done."""


class _Stop:
    """What was asked for, once for the whole process."""

    def __init__(self):
        self.signal: str | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a person who asks twice does not want to wait
        self.signal = signal.Signals(number).name
        log.warning("%s: finishing what is at hand, then stopping", self.signal)


_stop = _Stop()


def requested() -> bool:
    """Whether the run has been told to stop."""
    return _stop.signal is not None


def check() -> None:
    """Stop here if that was asked for.

    Raises:
        Interrupted: it was.
    """
    if requested():
        raise Interrupted(_stop.signal)


@contextmanager
def heeded() -> Iterator[None]:
    """Note signals instead of dying of them.

    Those that somebody else handles already (as submitit does, which puts a job back in Slurm's queue) are left to him, and so
    are all outside the main thread, where none can be handled.
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
