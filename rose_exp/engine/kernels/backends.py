"""Which backend sweeps a layer."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from . import cpu, plain
from .available import interpreted

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
    if backend not in ("torch", fast) and not (backend == "triton" and interpreted() and dtype == torch.float32):
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
