"""Nested settings by dotted name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists and empty mappings as they are."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def within(name: str, other: str) -> bool:
    """Whether the setting ``name`` is ``other`` or a part of it."""
    return name == other or name.startswith(f"{other}.")


def without(values: Mapping[str, Any], others: Iterable[str]) -> dict[str, Any]:
    """Flat settings less those that are in any of ``others``."""
    left_out = tuple(others)
    return {name: value for name, value in values.items() if not _in_any(name, left_out)}


@cache
def _in_any(name: str, others: tuple[str, ...]) -> bool:
    return any(within(name, other) for other in others)
