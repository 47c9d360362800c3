"""Kernels for the inner loop of the sweep, with one backend per kind of hardware.

A backend is a module of three functions on one block ``w`` (width, rows) of the transposed weight. ``choose(w, upper, count)``
returns an unstructured mask. ``sweep_chosen(w, upper, mask)`` and ``sweep_groups(w, upper, mask, widths, counts)`` sweep the
block in place, pruned weights to exact zeros, and return its errors (width, rows).
"""
