"""Typed settings of a run, their checks, and the effects of each setting."""
