"""Error messages for settings, in the form "setting: expected …, got …"."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from ..runtime.errors import suggest
from ..runtime.redaction import redact
from ..runtime.wheels import WHEELS
from .section import fields_of, is_section

UNQUOTED_PATTERN = 'YAML reads an unquoted N:M such as 2:4 as a number; write it in quotes, "2:4"'


def unquoted_pattern(value: object) -> str | None:
    """Return the N:M pattern that YAML has read as a number, or None if ``value`` is not such a number.

    YAML 1.1 reads N:M with M below 60 as N · 60 + M, so both can be recovered. Other patterns are text in YAML as well.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    pruned, group = divmod(value, 60)
    return f"{pruned}:{group}" if 1 <= pruned <= group else None


def explain(mistake: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Return one of pydantic's errors about ``root`` in the form "setting: expected …, got …"."""
    setting = ".".join(str(part) for part in mistake["loc"])
    got = f"got {redact({setting: mistake['input']})[setting]!r}"  # the value of a setting such as password is a secret
    kind, context = mistake["type"], mistake.get("ctx", {})
    if mistake["loc"][-1] in ("str", "list[str]"):  # the setting is a union of two types
        return f"{setting.rpartition('.')[0]}: expected text or a list of texts, {got}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{setting}: no such setting, {got}{_nearest_setting(mistake['loc'], root)}"
    if kind in ("dataclass_type", "model_type"):
        return f"{setting}: expected a group of settings, {got}"
    if kind == "missing":
        return f"{setting}: expected a value, got none"
    if kind == "value_error":  # raised by an option class, whose message starts with the field's name
        return f"{setting}.{context['error']}{_nearest_choice(str(context['error']))}"
    if kind == "literal_error":
        hint = suggest(mistake["input"], re.findall(r"'([^']+)'", context["expected"]))
        return f"{setting}: expected {context['expected']}, {got}{hint}"
    if kind == "string_too_short":
        return f"{setting}: expected text that is not empty, {got}"
    bounds = {
        "greater_than_equal": "at least {ge:g}",
        "less_than_equal": "at most {le:g}",
        "greater_than": "above {gt:g}",
        "less_than": "below {lt:g}",
        "finite_number": "a finite number",
    }
    if kind == "less_than" and math.isinf(context["lt"]):
        kind = "finite_number"
    if kind in bounds:
        percent = kind == "less_than_equal" and context["le"] == 1 and 5 <= mistake["input"] <= 100
        hint = f"; did you mean {mistake['input'] / 100:g}?" if percent else ""
        return f"{setting}: expected {bounds[kind].format(**context)}, {got}{hint}"
    if kind == "string_type":
        return f"{setting}: expected text, {got}{_quotes_hint(setting, mistake['input'])}"
    expected = mistake["msg"].removeprefix("Input should be ").split(",")[0]
    return f"{setting}: expected {expected}, {got}"


def _quotes_hint(setting: str, value: Any) -> str:
    """Return a hint for text that YAML reads as a value of another type."""
    if setting.endswith(".pattern") and (pattern := unquoted_pattern(value)) is not None:
        return f', which is how YAML reads {pattern} without quotes; write "{pattern}"'
    return f'; text that looks like another type needs quotes, "{value}"' if isinstance(value, (bool, int, float, date)) else ""


def _nearest_choice(message: str) -> str:
    """Return a hint with the most similar of the choices in "setting: expected one of a, b, got 'c'"."""
    choices = re.fullmatch(r"\w+: expected one of (.+), got '(.+)'", message)
    return suggest(choices[2], choices[1].split(", ")) if choices else ""


def _nearest_setting(location: tuple, root: type[BaseModel]) -> str:
    """Return a hint with the most similar setting in the section of ``location``."""
    section: Any = root
    for part in location[:-1]:
        if get_origin(section) is dict:  # ``part`` is a name that the user chooses
            section = get_args(section)[-1]
        else:
            section = fields_of(section)[part].annotation
            if get_origin(section) in (Union, UnionType):
                section = get_args(section)[0]
    return suggest(location[-1], fields_of(section) if is_section(section) else {})


def embedded_problem(where: str, name: str | None, kind: str) -> list[str]:
    """Return the error of an unknown embedded file of this kind, or an empty list."""
    known = [key for key, wheel_file in WHEELS.items() if wheel_file.kind == kind]
    if name in known:
        return []
    return [f"{where}: expected one of {', '.join(known)}, got {name!r}{suggest(name, known)}"]


def looks_local(path: str) -> bool:
    """Return whether a model path must be local, because a hub ID is 'name' or 'owner/name'."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(".gguf") or os.path.exists(path)


def file_problem(where: str, path: str, folder: bool = True) -> list[str]:
    """Return the error of a path that does not exist, with the most similar name in its folder, or an empty list."""
    place = Path(os.path.expanduser(path))
    if os.path.isfile(place) or (folder and os.path.isdir(place)):  # unlike those of Path, these never raise an error
        return [] if os.access(place, os.R_OK) else [f"{where}: expected a readable file, got {path!r}: permission denied"]
    expected = "a folder or file" if folder else "a file"
    hint = ""
    if os.path.isdir(place.parent) and os.access(place.parent, os.R_OK):
        hint = suggest(place.name, [entry.name for entry in place.parent.iterdir()])
    return [f"{where}: expected {expected} that exists, got {str(path)!r}{hint}"]
