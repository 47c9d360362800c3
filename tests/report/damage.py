"""Damaged run records: every value of a valid record, replaced by values of other types or removed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

REMOVED = object()
WRONG = (
    REMOVED,
    None,
    True,
    -1,
    2.5,
    10**400,
    float("nan"),
    "",
    "text",
    "\ud800",
    [],
    [None],
    ["text"],
    [[1]],
    {},
    {"": {}},
    {"a": 1},
)


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Yield the place of every value in JSON data, as keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from places(item, (*place, key))


def replaced(data: Any, place: tuple, value: Any) -> Any:
    """Return a copy of JSON data with another value at a place."""
    changed = copy.deepcopy(data)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if value is REMOVED:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return changed


def damaged(data: Any, generator: random.Random, count: int) -> Iterator[Any]:
    """Yield copies of JSON data, each with one to three wrong values."""
    for _ in range(count):
        changed = data
        for _ in range(generator.randint(1, 3)):
            changed = replaced(changed, generator.choice(list(places(changed))), generator.choice(WRONG))
        yield changed
