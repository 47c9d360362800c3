"""Memory and disk space that are available to this process."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from .memory import Footprint

RESERVED = 128 * 2**20  # bytes of address space that a run reserves without using, such as stacks of threads
UNLIMITED = 2**60  # bytes; version 1 of control groups states a number of this size if there is no limit


def available(folder: Path, device: torch.device, mapped: int = 0) -> Footprint:
    """Return the bytes available to this process, including the memory that it already uses.

    For the host, this is the minimum of the machine's free memory and all limits on the process and its control groups. For
    the disk of ``folder``, it is the free space.

    Args:
        mapped: size in bytes of the largest file that is mapped at a time. Limits on the process count it as a whole; other
            limits count the parts that have been read.
    """
    used = psutil.Process().memory_info()
    host = [psutil.virtual_memory().available + used.rss]
    host += [free + used.rss for free in control_groups()]
    for kind, used_bytes in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", used.rss))):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            host.append(max(0, soft - used_bytes - RESERVED - mapped + used.rss))
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    while not folder.exists():
        folder = folder.parent
    return Footprint(min(host), on_device, shutil.disk_usage(folder).free)


def control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield the bytes that each control group of this process leaves free, from its own group up to the root.

    Reads version 2 (``memory.max`` and ``memory.high``, at which processes are slowed down) and version 1
    (``memory.limit_in_bytes``). File cache counts as free, because the system can reclaim it.
    """
    for line in _lines(own):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            limits, usage, cache, top = ("memory.max", "memory.high"), "memory.current", "file", root
        elif "memory" in controllers.split(","):
            limits, usage, cache, top = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_cache", root / "memory"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container, the path can be one outside of it
            used = _number(folder / usage)
            if used is not None:
                cached = _statistic(folder / "memory.stat", cache)
                for limit in (_number(folder / name) for name in limits):
                    if limit is not None and limit < UNLIMITED:
                        yield max(0, limit - used + cached)
            if folder == top:
                break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # no control groups
        return []


def _number(path: Path) -> int | None:
    """Return the number in a file; None if the file does not exist or holds ``max``."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    values = dict(line.split() for line in _lines(path) if len(line.split()) == 2)
    return int(values.get(name, 0))
