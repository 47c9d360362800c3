"""Runs: one run from settings to record, its identity, its memory, and the reuse of finished runs."""
