"""Whether Triton is installed, and how its kernels run."""

from __future__ import annotations

import importlib.util
import os


def has_triton() -> bool:
    """Whether Triton is installed, as it is with CUDA builds of torch."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device (the variable is Triton's own)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
