"""Run records and experiment trackers."""

from .reading import read_record
from .record import RunRecord, Stopwatch, environment
from .trackers import FailSafeTracker, Identity, is_tracked

__all__ = ["FailSafeTracker", "Identity", "RunRecord", "Stopwatch", "environment", "is_tracked", "read_record"]
