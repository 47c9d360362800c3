"""A job: one run of a command."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..runs.identity import run_id
from ..settings.schema import Settings


@dataclass(frozen=True)
class Job:
    """One run of a command.

    Attributes:
        name: the overrides that differ from the other jobs of the sweep; for a single run, its method, model and pattern.
        config: the resolved configuration.
    """

    name: str
    settings: Settings
    config: dict[str, Any]

    @cached_property
    def run_id(self) -> str:
        return run_id(self.settings)
