"""Limits of GPUs, from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Rate = Literal["float32", "tf32", "float16"]


@dataclass(frozen=True)
class Hardware:
    """Limits of a GPU, from its data sheet.

    Attributes:
        bandwidth: bytes of device memory per second.
        float32, tf32, float16: peak operations per second, without sparsity.
        processors: number of streaming multiprocessors.
        lanes: float32 units of a multiprocessor.
    """

    name: str
    bandwidth: float
    float32: float
    tf32: float
    float16: float
    processors: int
    lanes: int

    @property
    def clock(self) -> float:
        """Cycles per second at which the multiprocessors reach the float32 peak."""
        return self.float32 / (2 * self.processors * self.lanes)


HARDWARE = [
    Hardware("A100 40 GB", 1555e9, 19.5e12, 156e12, 312e12, 108, 64),
    Hardware("A100 80 GB", 2039e9, 19.5e12, 156e12, 312e12, 108, 64),
    Hardware("H100 SXM", 3350e9, 67e12, 494.7e12, 989.4e12, 132, 128),
    Hardware("H200", 4800e9, 67e12, 494.7e12, 989.4e12, 132, 128),
]


def of_name(name: str, memory: int) -> Hardware | None:
    """Return the limits of a CUDA device, or None if its data sheet is not included.

    Args:
        name: as ``torch.cuda.get_device_name`` returns it.
        memory: bytes of device memory.
    """
    a100, a100_80, h100, h200 = HARDWARE
    if "H200" in name:
        return h200
    if "H100" in name and not any(variant in name for variant in ("PCIe", "NVL", "MIG")):  # these have other limits
        return h100
    if "A100" in name and "MIG" not in name:
        return a100_80 if memory > 50e9 else a100
    return None


def of_device(device: torch.device) -> Hardware | None:
    """Return the limits of a device, or None for a CPU or a GPU whose data sheet is not included."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return of_name(properties.name, properties.total_memory)
