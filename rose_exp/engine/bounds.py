"""Checks of option dataclasses against the bounds in their annotations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Le(1)]
NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
AboveZero = Annotated[float, Gt(0), Lt(math.inf)]


TYPES: dict[type, tuple[str, type]] = {
    bool: ("true or false", bool),
    int: ("an integer", Integral),
    float: ("a number", Real),
}
"""For the types of options, what an error says that it expects, and which values are accepted. A bool is no number."""


def check_options(options: Any) -> None:
    """Check the fields of a dataclass against the bounds and choices in their annotations.

    Call it from ``__post_init__``. The bounds are those of ``annotated_types``, which pydantic also enforces, so each bound is
    defined once.

    Raises:
        ValueError: a field has the wrong type, is outside its bounds or none of its choices. The message names the field.
    """
    for name, kind in _annotations(type(options)):
        value = getattr(options, name)
        expected = _expectation(kind, value)
        if expected is not None:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


@cache
def _annotations(cls: type) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(cls, include_extras=True)
    return tuple((field.name, hints[field.name]) for field in fields(cls))


def _expectation(kind: Any, value: Any) -> str | None:
    """Describe what an annotation expects; return None if the value meets it."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return None if value in options else f"one of {', '.join(map(str, options))}"
    if kind in TYPES:
        expected, accepted = TYPES[kind]
        return None if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)) else expected
    if get_origin(kind) is Annotated:
        bounds, problem = list(options[1:]), _expectation(options[0], value)
        if problem is not None:
            return problem
        return None if all(_within(bound, value) for bound in bounds) else describe(options[0], bounds)
    if NoneType in options:  # an optional field
        inner_kinds = [inner_kind for inner_kind in options if inner_kind is not NoneType]
        expectations = [] if value is None else [_expectation(inner_kind, value) for inner_kind in inner_kinds]
        return f"{expectations[0]} or None" if expectations and None not in expectations else None
    return None


def _within(bound: Any, value: float) -> bool:
    match bound:
        case Ge(ge=limit):
            return value >= limit
        case Gt(gt=limit):
            return value > limit
        case Le(le=limit):
            return value <= limit
        case Lt(lt=limit):
            return value < limit
        case MultipleOf(multiple_of=step):
            return value % step == 0
    raise TypeError(f"expected a bound of annotated_types, got {bound!r}")


def describe(kind: type, bounds: list[Any]) -> str:
    """Return a phrase for a bounded number, such as "a number from 0 to 1" or "at least 1"."""
    low = next(_limits(bounds, Ge, Gt), None)
    high = next(_limits(bounds, Le, Lt), None)
    finite = "a finite number " if high == (Lt, math.inf) else ""
    if high is None or finite:
        least = f"above {low[1]:g}" if low[0] is Gt else f"{'of ' if finite else ''}at least {low[1]:g}"
        steps = [bound.multiple_of for bound in bounds if isinstance(bound, MultipleOf)]
        return f"{finite}{f'a multiple of {steps[0]}, ' if steps else ''}{least}"
    start = f"above {low[1]:g}" if low[0] is Gt else f"from {low[1]:g}"
    what = "an integer" if kind is int else "a number"
    return f"{what} {start} to {'below ' if high[0] is Lt else ''}{high[1]:g}"


def _limits(bounds: list[Any], *kinds: type) -> Iterator[tuple[type, float]]:
    for bound in bounds:
        for kind in kinds:
            if isinstance(bound, kind):
                yield kind, getattr(bound, kind.__name__.lower())
