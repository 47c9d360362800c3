"""One-shot pruning of large language and diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["run", "sweep"]


def __getattr__(name: str) -> str:
    """Return ``__version__``, which is slow to find."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rose_exp")
    except PackageNotFoundError:  # running from a checkout that is not installed
        return "0+unknown"


def run(overrides: Sequence[str] = (), folder: str | Path = "outputs") -> dict[str, Any]:
    """Execute one run in ``folder``/RUN_ID, like ``rose-exp OVERRIDES…``.

    Args:
        overrides: overrides as on the command line, such as ``["method=rose", "sparsity.ratio=0.7"]``.
        folder: parent of the run's folder.
    Returns:
        The run record, as in ``run.json``. If the run is already finished, its existing record.
    Raises:
        SettingsError: the overrides have errors, or specify several runs. The message lists all errors.
        RoseExpError: an error outside the code. The record has status ``failed`` and the error.
    """
    from pathlib import Path

    from .api import run_one  # slow to import, and the engine needs none of it

    return run_one(list(overrides), Path(folder))


def sweep(overrides: Sequence[str], folder: str | Path = "outputs") -> list[dict[str, Any]]:
    """Execute the jobs of a sweep one after the other, like ``rose-exp -m OVERRIDES…``.

    Args:
        overrides: overrides as on the command line, such as ``["method=rose,wanda"]``.
        folder: parent of the runs' folders.
    Returns:
        The run record of each job. Those of failed jobs have status ``failed`` and the error.
    Raises:
        SettingsError: the overrides have errors. The message lists all of them.
    """
    from pathlib import Path

    from .api import run_all

    return run_all(list(overrides), Path(folder))
