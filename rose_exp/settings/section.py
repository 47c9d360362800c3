"""The base class of the sections of settings that are not option classes of the engine."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, get_type_hints

import pydantic
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def problems(self, where: str) -> list[str]:
        """Return the errors that pydantic's checks of single fields do not cover.

        Args:
            where: the section's name, for the messages.
        """
        return []


def is_section(kind: Any) -> bool:
    """Return whether a type has settings of its own: a section, or an option class of the engine."""
    return isinstance(kind, type) and (issubclass(kind, Section) or is_dataclass(kind))


def fields_of(section: type) -> dict[str, FieldInfo]:
    """Return the fields of a section or option class by name, as pydantic sees them."""
    if issubclass(section, Section):
        return dict(section.model_fields)
    hints = get_type_hints(section, include_extras=True)
    return {field.name: _field_info(hints[field.name], field) for field in fields(section)}


def _field_info(kind: Any, field: Field) -> FieldInfo:
    if field.default is not MISSING:
        return FieldInfo.from_annotated_attribute(kind, field.default)
    if field.default_factory is not MISSING:
        return FieldInfo.from_annotated_attribute(kind, pydantic.Field(default_factory=field.default_factory))
    return FieldInfo.from_annotation(kind)


def changed(section: Any, **values: Any) -> Any:
    """Return a copy of a section or option class with other values. Only option classes check them."""
    return replace(section, **values) if is_dataclass(section) else section.model_copy(update=values)


def problems_of(section: Any, where: str) -> list[str]:
    """Return the errors of a section that involve several of its fields. Option classes of the engine have none."""
    return section.problems(where) if hasattr(section, "problems") else []
