"""The interface of experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

LAYER_NUMBERS = ("error", "relative_range", "reordered", "damping", "seconds", "sparsity")  # logged for each layer


@dataclass(frozen=True)
class Identity:
    """Name of a run in a tracker.

    Attributes:
        name: the settings that differ from the other jobs of its sweep.
        group: name of the sweep; None for a single run.
    """

    name: str
    group: str | None = None


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker receives when it starts. No text in it contains a secret.

    Attributes:
        identity: name and group of the run.
        config: the resolved configuration, with the run's ``label`` and ``run_id``.
        folder: the run's folder.
        tags: the run's tags.
        resumed: what :meth:`Tracker.start` has returned in the process that this run continues; None for a new run.
    """

    identity: Identity
    config: Mapping[str, Any]
    folder: Path
    tags: Sequence[str] = ()
    resumed: str | None = None


class Tracker(Protocol):
    """Interface of all trackers. The keyword arguments of a tracker's class are its options.

    A run that resumes logs all layers again, including those of earlier processes.
    """

    def start(self, run: TrackedRun) -> str | None:
        """Open the tracker at the start of the run.

        Returns:
            The tracker's own ID of the run if a later process can continue it, else None.
        """

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        """Log a pruned layer; ``report`` is an entry of the record's ``layers``."""

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        """Log all metrics and a table of all layers."""

    def figure(self, name: str, path: Path) -> None:
        """Log a PNG file."""

    def keep(self, record: Path, model: Path | None) -> None:
        """Store the run record.

        Args:
            model: the folder of the saved model; None if the run saves none.
        """

    def finish(self, failed: bool) -> None:
        """Close the tracker at the end of the run."""
