"""Runs: the stages of a run, its ID and record, memory estimates, and the reuse of finished runs."""
