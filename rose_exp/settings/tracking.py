"""Settings of experiment trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from ..runtime.errors import suggest
from ..runtime.plugins import Plugin
from ..runtime.redaction import redacted
from .plugins import TRACKERS_GROUP, install_plugins
from .section import Section
from .tracker_options import option_problems

LONGEST_NAME = 128  # characters of names in W&B
LONGEST_TAG = 64  # characters of tags in W&B
NOT_IN_PROJECT = r"/\#?%:"  # characters that W&B rejects in the name of a project
BEFORE = ("mode", "project", "entity", "group", "name", "job_type", "save_model")  # settings of W&B, once directly in tracking


class TrackerSettings(Section):
    """Settings of one tracker.

    Attributes:
        package: the package that the tracker needs; None if it needs none.
        place: names of the settings that identify where the tracker logs to.
    """

    place: ClassVar[tuple[str, ...]] = ()

    @property
    def package(self) -> str | None:
        return None

    @property
    def active(self) -> bool:
        """Whether the tracker logs anything."""
        return True

    def problems(self, where: str) -> list[str]:
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return []
        name = self.package.replace("_", "-")
        return [f"{where}: expected an installed {name}, got none: pip install {name}"]


class WandbSettings(TrackerSettings):
    place: ClassVar[tuple[str, ...]] = ("mode", "project", "entity", "save_model")

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "rose_exp"
    entity: str | None = None
    group: str | None = None  # null: the name of the sweep
    name: str | None = None  # null: the settings that differ from the other jobs of the sweep
    job_type: str = "prune"
    save_model: bool = False  # upload the pruned model as an artifact

    @property
    def package(self) -> str:
        return "wandb"

    @property
    def active(self) -> bool:
        return self.mode != "disabled"

    def problems(self, where: str) -> list[str]:
        """Return the errors of names that W&B would reject when the run starts."""
        problems = super().problems(where)
        if problems or not self.active:
            return problems
        for name in ("project", "entity", "group", "name", "job_type"):
            text = getattr(self, name)
            if text is not None and (not text.strip() or len(text) > LONGEST_NAME):
                problems.append(f"{where}.{name}: expected 1 to {LONGEST_NAME} characters, got {_counted(redacted(text))}")
        if set(self.project) & set(NOT_IN_PROJECT):
            problems.append(f"{where}.project: expected a name without {' '.join(NOT_IN_PROJECT)}, got {self.project!r}")
        return problems


class TensorBoardSettings(TrackerSettings):
    @property
    def package(self) -> str:
        return "tensorboard"


class CsvSettings(TrackerSettings):
    pass


class AccelerateSettings(TrackerSettings):
    """A tracker of Hugging Face accelerate."""

    place: ClassVar[tuple[str, ...]] = ("tracker", "project", "options")

    tracker: Literal["aim", "comet_ml", "mlflow", "trackio"]
    project: str = "rose_exp"
    options: dict[str, Any] = Field({})  # further keyword arguments of accelerate's class for the tracker

    @property
    def package(self) -> str:
        return self.tracker


class TrackingSettings(Section):
    """The trackers of a run, each with its settings. Trackers of other packages are additional fields."""

    model_config = ConfigDict(extra="allow")

    wandb: WandbSettings | None = None
    tensorboard: TensorBoardSettings | None = None
    csv: CsvSettings | None = None
    accelerate: AccelerateSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _none(cls, values: Any) -> Any:
        """Read null, which removes all trackers in a configuration file, as no trackers."""
        return {} if values is None else values

    @property
    def own(self) -> dict[str, TrackerSettings]:
        """The trackers of this package that log anything, by name."""
        chosen = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: settings for name, settings in chosen.items() if settings is not None and settings.active}

    @property
    def others(self) -> dict[str, Mapping[str, Any]]:
        """The options of the trackers of other packages, by name."""
        return {name: options for name, options in (self.model_extra or {}).items() if options is not None}

    @property
    def names(self) -> list[str]:
        """The names of all trackers that log anything."""
        return [*self.own, *self.others]

    def plugin(self, name: str) -> Plugin:
        """Return a tracker of another package."""
        return install_plugins()[TRACKERS_GROUP][name]

    def problems(self, where: str) -> list[str]:
        chosen = {name: getattr(self, name) for name in type(self).model_fields}
        problems = [p for name, s in chosen.items() if s is not None for p in s.problems(f"{where}.{name}")]
        return problems + [problem for name, options in self.others.items() for problem in self._other(name, options, where)]

    def _other(self, name: str, options: Any, where: str) -> Iterator[str]:
        """Yield the errors of a field that is not a tracker of this package."""
        known = install_plugins()[TRACKERS_GROUP]
        if name in known:
            yield from option_problems(known[name], options, f"{where}.{name}")
        elif moved := moved_setting(f"{where}.{name}"):
            yield moved
        else:
            names = [*type(self).model_fields, *known]
            yield f"{where}.{name}: no such tracker; expected one of {', '.join(names)}{suggest(name, names)}"

    def tag_problems(self, tags: Sequence[str]) -> list[str]:
        """Return the errors of tags that W&B would reject when the run starts."""
        if "wandb" not in self.own:
            return []
        return [
            f"tags: expected tags of 1 to {LONGEST_TAG} characters with tracking=wandb, got {_counted(tag)}"
            for tag in map(redacted, tags)
            if not tag.strip() or len(tag) > LONGEST_TAG
        ]


def moved_setting(name: str) -> str | None:
    """Return the error of a setting of an earlier version, which names the new setting, or None for another setting."""
    group, _, last = name.partition(".")
    if group != "tracking" or last not in ("kind", *BEFORE):
        return None
    new = "tracking=wandb, or tracking=[csv,wandb] for several trackers" if last == "kind" else f"tracking.wandb.{last}"
    return f"{name}: no such setting; use {new}"


def current(tracking: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section ``tracking`` of a record, which can be of an earlier version, in the current form."""
    if "kind" not in tracking:
        return dict(tracking)
    kind, options = tracking["kind"], {name: value for name, value in tracking.items() if name != "kind"}
    return {} if kind == "none" else {kind: options if kind == "wandb" else {}}


def _counted(text: str) -> str:
    """Return the start of a text, and its length."""
    start = text if len(text) <= 20 else f"{text[:20]}…"
    return f"{start!r} with {len(text)} characters"
