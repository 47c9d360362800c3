"""Selection of the backend for the sweep."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from . import cpu, plain
from .available import interpreted

Backend = Literal["auto", "torch", "numba", "triton"]


def resolve(backend: Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend to use on a device, resolving ``auto``.

    For float32, ``auto`` selects Numba on a CPU and Triton on CUDA; otherwise it selects plain torch.

    Raises:
        ValueError: if the backend is unknown, or supports neither this device nor this dtype.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    fast = {"cpu": "numba", "cuda": "triton"}.get(device.type) if dtype == torch.float32 else None
    if backend == "auto":
        return fast or "torch"
    if backend not in ("torch", fast) and not (backend == "triton" and interpreted() and dtype == torch.float32):
        expected = f"auto, torch or {fast}" if fast else "auto or torch"
        target = f"{device.type} and {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"backend: expected {expected} on {target}, got {backend!r}")
    return backend


def kernels_for(backend: Backend, weight: Tensor) -> ModuleType:
    """Return the kernel module for ``weight``."""
    name = resolve(backend, weight.device, weight.dtype)
    return cuda_kernels() if name == "triton" else {"torch": plain, "numba": cpu}[name]


def cuda_kernels() -> ModuleType:
    """Import and return the Triton kernels; only CUDA builds of torch include Triton."""
    from . import gpu

    return gpu
