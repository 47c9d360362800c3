"""Tables and figures from run records. Reads ``run.json`` and the data of figures only, and imports no pruning code."""

from .table import collect_records, format_table

__all__ = ["collect_records", "format_table"]
