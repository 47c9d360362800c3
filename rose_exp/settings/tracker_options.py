"""Options of experiment trackers that other packages provide: the keyword arguments of their classes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError

from ..runtime.errors import RoseExpError
from ..runtime.plugins import Plugin
from .messages import explain

REQUIRED = "???"  # OmegaConf's mark of a setting that needs a value
STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@cache
def options_class(plugin: Plugin) -> type:
    """Return a dataclass with a field for each option of a tracker.

    Raises:
        RoseExpError: the tracker has arguments without names, or with annotations that cannot be checked.
    """
    where = plugin.where
    try:
        hints = get_type_hints(plugin.value.__init__, include_extras=True)
        fields = [(name, hints.get(name, Any), option) for name, option in _options(plugin.value, where)]
        options = dataclasses.make_dataclass("Options", fields, kw_only=True, namespace={"__pydantic_config__": STRICT})
        TypeAdapter(options)
    except (TypeError, ValueError, NameError, PydanticUserError) as error:
        raise RoseExpError(f"{where}: expected options with annotations that can be checked: {error}") from error
    return options


def _options(tracker: type, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the names and new fields of the options."""
    if dataclasses.is_dataclass(tracker):
        for option in dataclasses.fields(tracker):
            if option.init:
                yield option.name, dataclasses.field(default=option.default, default_factory=option.default_factory)
        return
    for option in inspect.signature(tracker).parameters.values():
        if option.kind not in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY):
            raise RoseExpError(f"{where}: expected keyword options, got {option}")
        if option.default is option.empty:
            yield option.name, dataclasses.field()
        elif isinstance(option.default, (list, dict, set)):
            yield option.name, dataclasses.field(default_factory=option.default.copy)
        else:
            yield option.name, dataclasses.field(default=option.default)


def default_options(plugin: Plugin) -> dict[str, Any]:
    """Return the options of a tracker with their defaults, as plain values for a configuration.

    Raises:
        RoseExpError: a default is not a plain value.
    """
    options = {option.name: _default(option) for option in dataclasses.fields(options_class(plugin))}
    try:
        return TypeAdapter(dict[str, Any]).dump_python(options, mode="json")
    except PydanticSerializationError as error:
        raise RoseExpError(f"{plugin.where}: expected options with plain defaults, got another one: {error}") from error


def _default(option: dataclasses.Field) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return REQUIRED if option.default is dataclasses.MISSING else option.default


def read_options(plugin: Plugin, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a tracker, converted to the types of its keyword arguments like the settings.

    Raises:
        ValidationError: an option is unknown, missing or of the wrong type.
    """
    return vars(TypeAdapter(options_class(plugin)).validate_python(dict(options)))


def option_problems(plugin: Plugin, options: Any, where: str) -> list[str]:
    """Return the errors of the options of a tracker."""
    if not isinstance(options, Mapping):
        return [f"{where}: expected a group of settings, got {options!r}"]
    try:
        read_options(plugin, options)
    except ValidationError as error:
        return [f"{where}.{explain(problem, options_class(plugin)).removeprefix('.')}" for problem in error.errors()]
    return []
