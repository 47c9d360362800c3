"""Run records and experiment trackers."""

from .fail_safe import Trackers, entries, untracked
from .reading import read_record
from .record import RunRecord, Stopwatch, environment
from .tracker import Identity, TrackedRun, Tracker

__all__ = [
    "Identity",
    "RunRecord",
    "Stopwatch",
    "TrackedRun",
    "Tracker",
    "Trackers",
    "entries",
    "environment",
    "read_record",
    "untracked",
]
