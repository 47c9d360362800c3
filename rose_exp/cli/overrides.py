"""Parses the overrides of a command line, and checks them against the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ..runtime.errors import suggest
from ..settings.messages import UNQUOTED_PATTERN, unquoted_pattern
from ..settings.tracking import moved_setting
from .composer import COMPOSITION_ERRORS, Composer
from .quoting import quoted_path, syntax_hint, value_hint

ADD_MULTIRUN = "add -m to run one job per value"
SEVERAL = ("evaluation", "tracking")  # groups that allow several choices in one run


def valid_overrides(
    composer: Composer, texts: Sequence[str], others: Sequence[Override] = ()
) -> tuple[list[Override], list[str]]:
    """Separate the overrides that can be composed from the errors of the others.

    Args:
        others: valid overrides of the same command. The choices of groups in them decide which settings exist.
    """
    if not texts:
        return [], []
    parsed, problems = _parsed(composer, texts)
    groups = {override.key_or_group for override in parsed if composer.options(override.key_or_group)}
    in_groups = [o for o in parsed if o.key_or_group in groups and not _group_problems(composer, o)]
    other_groups = [o for o in others if composer.options(o.key_or_group)]
    config = _settings_of(composer, [*other_groups, *in_groups])
    valid: list[Override] = []
    for override in parsed:
        in_group = override.key_or_group in groups
        override_problems = _group_problems(composer, override) if in_group else _key_problems(composer, override, config)
        problems += override_problems or (_sweep_problems(override) if composer.multirun else [])
        if not override_problems:
            valid.append(override)
    return valid, problems


def _parsed(composer: Composer, texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Return the overrides that Hydra can read, of which the last one of a setting counts, and the errors of the others."""
    parsed: list[Override] = []
    problems: list[str] = []
    for place, text in enumerate(texts):
        try:
            override = composer.parse(text)
        except HydraException as error:
            reason = str(error).splitlines()[0].partition(" expecting {")[0]  # a long list of tokens
            group = "=" in text and composer.options(text.partition("=")[0].lstrip("+~"))
            hint = "" if group else syntax_hint(texts, place)
            problems.append(f"{text!r} is no override: expected setting=value ({reason}){hint}")
            continue
        if not composer.multirun and override.is_sweep_override():
            problems.append(_several_values_error(override))
            path = quoted_path(override)
            override = composer.parse(path) if path else override
        key = override.get_key_element()
        parsed = [o for o in parsed if o.is_delete() or o.get_key_element() != key]
        parsed.append(override)
    return parsed, problems


def _several_values_error(override: Override) -> str:
    """Return the error of a command that gives a setting several values but not ``-m``."""
    group = override.key_or_group
    hint = f"; {group}=[a,b] gives one run both" if group in SEVERAL else ""
    problem = f"{group}: expected one value, got several; {ADD_MULTIRUN}{hint}"
    return problem + value_hint(override, problem)


def _sweep_problems(override: Override) -> list[str]:
    """Return the error of a sweep without values."""
    if override.is_sweep_override() and override.is_discrete_sweep() and not list(choices(override)):
        return [f"{override.key_or_group}: expected at least one value, got {override.input_line!r}, which has none"]
    return []


def _group_problems(composer: Composer, override: Override) -> list[str]:
    if override.is_delete():
        return []
    group = override.key_or_group
    options = composer.options(group)
    problems = []
    for choice in choices(override):
        if isinstance(choice, list) and group not in SEVERAL:
            problems.append(choices_error(group, [str(name) for name in choice]))
            continue
        names = choice if isinstance(choice, list) else [choice]
        if len(set(map(str, names))) < len(names):
            problems.append(f"{group}: expected each choice once, got [{', '.join(map(str, names))}]")
        if group == "tracking" and len(names) > 1 and "none" in names:
            problems.append(f"{group}: expected none alone or trackers, got [{', '.join(map(str, names))}]")
        for name in names:
            if name is not None and str(name) not in options:
                expected = f"one of {', '.join(options)}"
                hint = f"; {UNQUOTED_PATTERN}" if unquoted_pattern(name) in options else suggest(name, options)
                if group == "model" and "/" in str(name):
                    hint = f"; for a folder or a model on the hub, give model=local model.path={name}"
                problems.append(f"{group}: expected {expected}, got {str(name)!r}{hint}")
    return problems


def choices_error(group: str, names: Sequence[str]) -> str:
    """Return the error of a run with several choices of a group."""
    listed = f"{group}: expected one choice, got the list [{', '.join(names)}]"
    if len(names) == 1:
        return f"{listed}; give {group}={names[0]}"
    return f"{listed}, whose settings would be mixed; -m {group}={','.join(names)} runs one job per choice"


def choices(override: Override) -> Iterable[Any]:
    """Return all values of an override or, for a searched interval, its ends."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.is_interval_sweep():
        return [override.value().start, override.value().end]
    return override.sweep_iterator()


def as_text(override: Override, value: Any) -> str:
    """Return ``setting=value`` for one value of an override."""
    if not override.is_sweep_override() and override.input_line:
        return override.input_line
    key = override.get_key_element()
    quoted = Override._get_value_element_as_str(value)
    return f"{key}={quoted}"


def _settings_of(composer: Composer, groups: Sequence[Override]) -> DictConfig:
    """Compose a configuration with all settings of these choices."""
    first = [as_text(override, next(iter(choices(override)), None)) for override in groups]
    try:
        return composer.compose(first)
    except COMPOSITION_ERRORS:  # checking a job reports the reason
        return composer.compose([])


def _key_problems(composer: Composer, override: Override, config: DictConfig) -> list[str]:
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or key.split(".")[0] == "hydra":
        return []
    names = _all_names({name: config._get_node(name) for name in config if name != "hydra"})
    if key in names or OmegaConf.select(config, key, throw_on_missing=False) is not None:
        return []
    if moved := moved_setting(key):
        return [moved]
    group, _, part = key.partition(".")
    choice = part.partition(".")[0]
    if choice in composer.options(group) and f"{group}.{choice}" not in names and group in SEVERAL:
        return [f"{key}: no such setting; it requires {group}={choice}, or {group}=[a,{choice}] in addition to others"]
    groups = composer.options("", ObjectType.GROUP)
    return [f"{key}: no such setting{suggest(key, [*names, *groups])}"]


def _all_names(nodes: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, node in nodes.items():
        names.append(f"{prefix}{key}")
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            names += _all_names({name: node._get_node(name) for name in node}, f"{prefix}{key}.")
    return names
