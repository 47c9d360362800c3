"""One clear error for every way in which a run can find no more memory."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..runtime.errors import RoseExpError
from .memory import gib

MESSAGES = (  # of the libraries whose errors have no type of their own, in lower case
    "can't allocate memory",
    "cannot allocate memory",
    "unable to allocate",
    "failed to allocate",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
)


@contextmanager
def explained(record: Mapping[str, Any]) -> Iterator[None]:
    """Raise RoseExpError in place of any error that means that memory is exhausted.

    Args:
        record: the data of the run record, whose ``estimate`` and ``seconds`` by stage the message names.
    """
    try:
        yield
    except RoseExpError:
        raise
    except Exception as error:
        if not is_exhaustion(error):
            raise
        raise RoseExpError(_message(error, record)) from error


def is_exhaustion(error: BaseException | None) -> bool:
    """Return whether an error, or an error that it was raised from, means that memory is exhausted."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, (RuntimeError, OSError, ImportError)) and any(text in str(error).lower() for text in MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _message(error: BaseException, record: Mapping[str, Any]) -> str:
    estimate = record.get("estimate")
    expected = ""
    if estimate:
        device = f"{gib(estimate['device'])} on the device and " if estimate["device"] is not None else ""
        expected = f" The estimate for the whole run was {device}{gib(estimate['host'])} on the host."
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"the run is out of memory: {reason}.{expected} Stop other processes, raise the memory limit, or lower the usage with "
        "pipeline.weights=disk, pipeline.by_blocks=true, pipeline.activations=disk or fewer calibration.samples"
    )
