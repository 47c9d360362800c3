"""A job: one run of a command."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..runs.identity import run_id
from ..settings.schema import Settings


@dataclass(frozen=True)
class Job:
    """One run of a command.

    Attributes:
        name: the overrides that differ from the other jobs of the sweep; for a single run, its method, model and pattern.
        config: the resolved configuration.
        folder_template: the folder of the run, with ``{run_id}`` in place of the run ID; relative to the folder of the sweep,
            if the job is part of one; None if it is not known in advance.
        ignored: the error of a setting that the job ignores, because only other jobs of a sweep use it; None if there is none.
    """

    name: str
    settings: Settings
    config: dict[str, Any]
    folder_template: str | None = None
    ignored: str | None = None

    @cached_property
    def run_id(self) -> str:
        return run_id(self.settings)

    def folder(self, sweep: Path | None) -> Path | None:
        """Return the folder of the run, or None if it is not known in advance.

        Args:
            sweep: the folder of the sweep; None for a single run.
        """
        if self.folder_template is None:
            return None
        own = self.folder_template.replace("{run_id}", self.run_id)
        return Path(own) if sweep is None else sweep / own
