"""All settings of a configuration by dotted name, parsed like the typed settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from .section import fields_of, is_section


@dataclass(frozen=True)
class Leaf:
    """A setting of a configuration.

    Attributes:
        name: dotted name.
        known: the same with ``*`` in place of a name that the user chose; None if this version has no such setting.
        value: the parsed value, or the default if the configuration does not have the setting.
        chosen: the part of the name that the user chose.
    """

    name: str
    known: str | None
    value: Any
    chosen: str = ""


def leaves(section: type, values: Mapping[str, Any], name: str = "", known: str = "", chosen: str = "") -> Iterator[Leaf]:
    """Yield the settings of a section: those in ``values`` as the typed settings parse them, the others with their defaults.

    Args:
        name: the section's name with a trailing dot.
        known: the same with ``*`` in place of ``chosen``.
        chosen: the part of the name that the user chose.
    """
    fields = _fields(section)
    for key, field in fields.items():
        if field.inner is None:
            if key in values or not field.required:
                value = field.read(values[key]) if key in values else field.default
                yield Leaf(name + key, known + key, value, chosen)
        elif field.named:
            for chosen_name, inner_values in (values.get(key) or {}).items():
                yield from leaves(field.inner, inner_values, f"{name}{key}.{chosen_name}.", f"{known}{key}.*.", chosen_name)
        elif values.get(key) is not None or field.required or field.default is not None:
            yield from leaves(field.inner, values.get(key) or {}, f"{name}{key}.", f"{known}{key}.", chosen)
    for other, value in flat({key: value for key, value in values.items() if key not in fields}, name).items():
        yield Leaf(other, None, value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``. Lists and empty mappings stay unchanged."""
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flattened |= flat(value, f"{prefix}{name}.")
        else:
            flattened[f"{prefix}{name}"] = value
    return flattened


@dataclass(frozen=True)
class _Field:
    """A field of a section.

    Attributes:
        inner: the section in the field; None if the field has a plain value.
        named: whether the field maps names that the user chooses to sections.
    """

    kind: TypeAdapter
    inner: type | None
    named: bool
    required: bool
    default: Any

    def read(self, value: Any) -> Any:
        """Parse a value like the typed settings. Return an invalid value, such as one of another version, unchanged."""
        try:
            return self.kind.validate_python(value)
        except ValidationError:
            return value


@cache
def _fields(section: type) -> dict[str, _Field]:
    fields = {}
    for key, field in fields_of(section).items():
        kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        fields[key] = _Field(TypeAdapter(kind), *_inner(field.annotation), field.is_required(), default)
    return fields


def _inner(annotation: Any) -> tuple[type | None, bool]:
    for kind in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
        named = get_origin(kind) is dict
        section = get_args(kind)[1] if named else kind
        if is_section(section):
            return section, named
    return None, False
