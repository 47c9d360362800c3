"""Settings of experiment trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

from ..runtime.redaction import redacted
from .section import Section

LONGEST_NAME = 128  # characters of names in W&B
LONGEST_TAG = 64  # characters of tags in W&B
NOT_IN_PROJECT = r"/\#?%:"  # characters that W&B rejects in the name of a project


class TrackingSettings(Section):
    kind: Literal["none", "wandb", "tensorboard", "csv"] = "none"
    mode: Literal["online", "offline", "disabled"] = "offline"  # W&B only
    project: str = "rose_exp"
    entity: str | None = None
    group: str | None = None  # null: the name of the sweep
    name: str | None = None  # null: the settings that differ from the other jobs of the sweep
    job_type: str = "prune"
    save_model: bool = False  # upload the pruned model as an artifact

    @property
    def active(self) -> bool:
        """Whether the run is logged to a tracker."""
        return self.kind != "none" and not (self.kind == "wandb" and self.mode == "disabled")

    def problems(self, where: str) -> list[str]:
        package = {"wandb": "wandb", "tensorboard": "tensorboard"}.get(self.kind)
        if package is not None and importlib.util.find_spec(package) is None:
            return [f"{where}.kind: expected an installed package, got {self.kind}: pip install {package}"]
        return self._wandb_problems(where) if self.kind == "wandb" and self.active else []

    def tag_problems(self, tags: Sequence[str]) -> list[str]:
        """Return the errors of tags that W&B would reject when the run starts."""
        if self.kind != "wandb" or not self.active:
            return []
        return [
            f"tags: expected tags of 1 to {LONGEST_TAG} characters with tracking=wandb, got {_counted(tag)}"
            for tag in map(redacted, tags)
            if not tag.strip() or len(tag) > LONGEST_TAG
        ]

    def _wandb_problems(self, where: str) -> list[str]:
        """Return the errors of names that W&B would reject when the run starts."""
        problems = []
        for name in ("project", "entity", "group", "name", "job_type"):
            text = getattr(self, name)
            if text is not None and (not text.strip() or len(text) > LONGEST_NAME):
                problems.append(f"{where}.{name}: expected 1 to {LONGEST_NAME} characters, got {_counted(redacted(text))}")
        if set(self.project) & set(NOT_IN_PROJECT):
            problems.append(f"{where}.project: expected a name without {' '.join(NOT_IN_PROJECT)}, got {self.project!r}")
        return problems


def _counted(text: str) -> str:
    """Return the start of a text, and its length."""
    start = text if len(text) <= 20 else f"{text[:20]}…"
    return f"{start!r} with {len(text)} characters"
