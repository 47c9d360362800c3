"""Run records and experiment trackers."""

from .record import RunRecord, Stopwatch, environment, read_record
from .trackers import FailSafeTracker, Identity

__all__ = ["FailSafeTracker", "Identity", "RunRecord", "Stopwatch", "environment", "read_record"]
