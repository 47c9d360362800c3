"""Hydra's quotes: how to write a value that Hydra would read as something else, such as a path with a comma."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

SETTING = r"(?:\+\+|\+)?[\w.@/:$-]+"  # the part of an override before the first "="


def quoted(setting: str, text: str) -> str | None:
    """Return a shell argument that sets a setting to exactly this text, or None if Hydra has no way to write it."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # OmegaConf reads an unescaped ${…} as an interpolation
    argument = f"{setting}={QuotedString(escaped, Quote.double).with_quotes()}"
    return shlex.quote(argument) if value_of(argument) == text else None


def value_of(argument: str) -> object:
    """Return the value that an override gives a setting, or None if it is no override or has several values."""
    try:
        override = OverridesParser.create().parse_override(argument)
        if override.is_sweep_override():
            return None
        return OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)["value"]
    except (HydraException, OmegaConfBaseException):
        return None


def syntax_hint(arguments: Sequence[str], place: int) -> str:
    """Return a hint for an argument that is no override, or an empty string.

    Args:
        arguments: all overrides of the command.
        place: index of the argument.
    """
    setting, equals, text = arguments[place].partition("=")
    if equals and re.fullmatch(SETTING, setting):
        return _hint(setting, text, "to give special characters, write")
    if equals or not place:
        return ""
    start = next((i for i in range(place, -1, -1) if "=" in arguments[i]), None)  # the value that the shell has split
    if start is None:
        return ""
    setting, _, text = " ".join(arguments[start : place + 1]).partition("=")
    return _hint(setting, text, "to give a value with spaces, write") if _is_path(text) else ""


def value_hint(override: Override, problem: str) -> str:
    """Return a hint for a problem of an override whose text Hydra has read as something else, or an empty string."""
    setting, _, text = (override.input_line or "").partition("=")
    if not text or value_of(override.input_line) == text or isinstance(override._value, QuotedString):
        return ""
    expects_text = "expected text" in problem and "which is how YAML reads" not in problem
    sweeps_path = override.is_sweep_override() and _is_path(text)
    if not (expects_text or sweeps_path or _exists(text)):
        return ""
    whole = problem.startswith(f"{override.key_or_group}:")  # otherwise, the problem is of an item of a list
    return _hint(setting, text, "to give this text itself, write", whole)


def quoted_path(override: Override) -> str | None:
    """Return an override with the text of one that Hydra reads as several values, if the text is an existing path."""
    setting, _, text = (override.input_line or "").partition("=")
    if not override.is_sweep_override() or not _exists(text):
        return None
    argument = quoted(setting, text)
    return argument and shlex.split(argument)[0]


def _hint(setting: str, text: str, introduction: str, whole: bool = False) -> str:
    is_list = not whole and re.fullmatch(r"\[.*\]", text) is not None
    argument = _quoted_list(setting, text[1:-1]) if is_list else quoted(setting, text)
    return f"; {introduction} {argument}" if argument else ""


def _quoted_list(setting: str, text: str) -> str | None:
    items = [item.strip() for item in text.split(",")]
    argument = f"{setting}=[{','.join(QuotedString(item, Quote.double).with_quotes() for item in items)}]"
    return shlex.quote(argument) if value_of(argument) == items else None


def _is_path(text: str) -> bool:
    return "/" in text or _exists(text)


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user
        return False
