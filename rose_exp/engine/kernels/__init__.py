"""The inner loop of the sweep, once for each kind of hardware, behind one interface.

A backend is a module of three functions on one block ``w`` (width, rows) of the transposed weight. ``choose(w, upper, count)``
gives an unstructured mask. ``sweep_chosen(w, upper, mask)`` and ``sweep_groups(w, upper, mask, widths, counts)`` sweep the
block in place, pruned weights to exact zeros, and return its errors (width, rows).
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from . import cpu, plain

Backend = Literal["auto", "torch", "numba", "triton"]


def resolve(backend: Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that ``auto`` stands for on a device, or the one asked for.

    ``auto`` is Numba on a CPU and Triton on CUDA for float32, and plain torch for all else.

    Raises:
        ValueError: an unknown backend, or one that cannot work on this device or with this dtype.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    fast = {"cpu": "numba", "cuda": "triton"}.get(device.type) if dtype == torch.float32 else None
    if backend == "auto":
        return fast or "torch"
    if backend not in ("torch", fast) and not (backend == "triton" and _interpreted() and dtype == torch.float32):
        expected = f"auto, torch or {fast}" if fast else "auto or torch"
        where = f"{device.type} and {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"backend: expected {expected} on {where}, got {backend!r}")
    return backend


def kernels_for(backend: Backend, weight: Tensor) -> ModuleType:
    """The module that sweeps blocks of ``weight``."""
    name = resolve(backend, weight.device, weight.dtype)
    return cuda_kernels() if name == "triton" else {"torch": plain, "numba": cpu}[name]


def cuda_kernels() -> ModuleType:
    """The Triton kernels; Triton is there with CUDA builds of torch only."""
    from . import gpu

    return gpu


def has_triton() -> bool:
    """Whether Triton is there, as it is with CUDA builds of torch."""
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device (the variable is Triton's own)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
