"""The inner loop of the sweep, once for each kind of hardware, behind one interface.

A backend is a module of three functions on one block ``w`` (width, rows) of the transposed weight. ``choose(w, upper, count)``
gives an unstructured mask. ``sweep_chosen(w, upper, mask)`` and ``sweep_groups(w, upper, mask, widths, counts)`` sweep the
block in place, pruned weights to exact zeros, and return its errors (width, rows).
"""
