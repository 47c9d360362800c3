"""A pool of devices for jobs that run at the same time, in whatever processes: each takes one that no other has."""

from __future__ import annotations

import getpass
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..runtime.ranks import launched

log = logging.getLogger(__name__)

PAUSE = 0.5  # seconds between two looks for a free device


@contextmanager
def claimed(wanted: str | Sequence[str], sweep: bool) -> Iterator[str]:
    """A device that is this job's alone until the end of the block, or of the process, whichever comes first.

    Args:
        wanted: a device, which is taken as it is; a list, of which the first free one is taken (one that is named twice can be
            had twice); or ``auto``, which in a sweep means any one GPU, where there is one.
    """
    devices = [wanted] if isinstance(wanted, str) else list(wanted)
    if wanted == "auto" and sweep and torch.cuda.is_available() and launched()[1] == 1:  # else torchrun has handed them out
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    elif isinstance(wanted, str):
        yield wanted
        return
    lock, device = _first_free([(FileLock(_lock_path(devices, place)), devices[place]) for place in range(len(devices))])
    try:
        yield device
    finally:
        lock.release()


def _first_free(places: Sequence[tuple[FileLock, str]]) -> tuple[FileLock, str]:
    waited = False
    while True:
        for lock, device in places:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return lock, device
        if not waited:
            log.info("waiting for a free device of %s", ", ".join(device for _, device in places))
            waited = True
        time.sleep(PAUSE)


def _lock_path(devices: Sequence[str], place: int) -> Path:
    """One file for each device of this machine and each time that it is named; jobs may see the same GPU by other numbers."""
    folder = Path(tempfile.gettempdir()) / f"rose_exp-devices-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name, times = devices[place], list(devices[:place]).count(devices[place])
    if name.startswith("cuda") and torch.cuda.is_available():
        name = str(torch.cuda.get_device_properties(torch.device(name)).uuid)
    return folder / f"{name.replace(':', '-')}.{times}.lock"
