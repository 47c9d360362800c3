"""Settings of the C library's allocator."""

from __future__ import annotations

import ctypes
import ctypes.util

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of glibc's mallopt
LARGE = 4 * 2**20  # bytes


def return_freed_memory() -> None:
    """Make the process return large tensors to the system as soon as they are freed.

    By default, glibc keeps freed memory of up to 32 MiB per tensor for later, in fragments that a tensor of another size may
    not fit into. The peak then depends on the order of allocations, and exceeds the memory in use by up to a fifth.
    """
    libc = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(libc), "mallopt", None) if libc else None
    if mallopt is not None:  # only glibc has it
        mallopt(MMAP_THRESHOLD, LARGE)
        mallopt(TRIM_THRESHOLD, 8 * LARGE)
