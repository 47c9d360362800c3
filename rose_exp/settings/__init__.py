"""Typed settings of a run, their checks, and what each of them can change."""
