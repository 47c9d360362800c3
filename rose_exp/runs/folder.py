"""The folder of a run, and the names of the files in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..runtime.fingerprint import folder_bytes
from ..tracking.record import FILE_NAME


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        root: the folder itself.
    """

    root: Path

    @property
    def record(self) -> Path:
        """The run record."""
        return self.root / FILE_NAME

    @property
    def state(self) -> Path:
        """What an interrupted run resumes from; deleted once the run is finished."""
        return self.root / "state"

    @property
    def model(self) -> Path:
        """The saved model."""
        return self.root / "model"

    @property
    def lock(self) -> Path:
        """The lock of the process that works on the run."""
        return self.root / ".lock"

    def model_bytes(self) -> int:
        """Return the size of the saved model in bytes; 0 if there is none."""
        return folder_bytes(self.model) if self.model.exists() else 0
