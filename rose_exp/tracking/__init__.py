"""Run records and experiment trackers."""

from .record import RunRecord, Stopwatch, environment, read_record
from .trackers import Guarded, Identity

__all__ = ["Guarded", "Identity", "RunRecord", "Stopwatch", "environment", "read_record"]
