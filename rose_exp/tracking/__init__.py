"""What a run leaves behind."""

from .record import RunRecord, Stopwatch, environment, read_record

__all__ = ["RunRecord", "Stopwatch", "environment", "read_record"]
