"""Tables from run records. Reads ``run.json`` only: nothing here imports the pipeline."""

from .table import SweepTable, collect_records, format_table

__all__ = ["SweepTable", "collect_records", "format_table"]
