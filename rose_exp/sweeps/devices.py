"""A pool of devices for parallel jobs, also in different processes: each job takes a device that no other job uses."""

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

PAUSE = 0.5  # seconds between checks for a free device


@contextmanager
def claimed(setting: str | Sequence[str], sweep: bool) -> Iterator[str]:
    """Reserve a device for this job until the end of the body or of the process.

    Args:
        setting: a device, which is not reserved; a list, whose first free device is reserved (a device listed twice can be
            reserved twice); or ``auto``, which in a sweep stands for a list of all GPUs, if there are any.
        sweep: whether the job is part of a sweep.
    Yields:
        The device.
    """
    devices = [setting] if isinstance(setting, str) else list(setting)
    if setting == "auto" and sweep and torch.cuda.is_available() and launched()[1] == 1:  # torchrun assigns devices itself
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    elif isinstance(setting, str):
        yield setting
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
    """Return the lock file of a device, one for each time that the list names it.

    The file name contains the UUID of a GPU, because jobs can see the same GPU under different indices.
    """
    folder = Path(tempfile.gettempdir()) / f"rose_exp-devices-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name, times = devices[place], list(devices[:place]).count(devices[place])
    if name.startswith("cuda") and torch.cuda.is_available():
        name = str(torch.cuda.get_device_properties(torch.device(name)).uuid)
    return folder / f"{name.replace(':', '-')}.{times}.lock"
