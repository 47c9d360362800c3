"""Tables from run records. Reads ``run.json`` only: nothing here imports the pipeline."""

from .table import collect_records, format_table

__all__ = ["collect_records", "format_table"]
