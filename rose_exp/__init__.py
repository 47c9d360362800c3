"""One-shot pruning of large language models: methods, orders and honest baselines on one engine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

try:
    __version__ = version("rose_exp")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"

__all__ = ["run", "sweep"]


def run(overrides: Sequence[str] = (), folder: str | Path = "outputs") -> dict[str, Any]:
    """What ``rose-exp OVERRIDES…`` does, from Python: one run, in ``folder``/RUN.

    Args:
        overrides: as on the command line, such as ``["method=rose", "sparsity.ratio=0.7"]``.
    Returns:
        The run record, as in ``run.json``; of an earlier run, where the same is finished already.
    Raises:
        SettingsError: the overrides have mistakes, all of them told, or stand for several runs.
        RoseExpError: something outside the code is wrong; the record says ``failed`` and why.
    """
    from .api import run_one  # slow to import, and the engine needs none of it

    return run_one(list(overrides), Path(folder))


def sweep(overrides: Sequence[str], folder: str | Path = "outputs") -> list[dict[str, Any]]:
    """What ``rose-exp -m OVERRIDES…`` does, from Python, one job after the other.

    Returns:
        A run record for every job; those of failed jobs say ``failed`` and why.
    Raises:
        SettingsError: the overrides have mistakes, all of them told.
    """
    from .api import run_all

    return run_all(list(overrides), Path(folder))
