"""What a run leaves behind."""

from .record import RunRecord, Stopwatch, environment, read_record
from .trackers import Guarded, Identity

__all__ = ["Guarded", "Identity", "RunRecord", "Stopwatch", "environment", "read_record"]
