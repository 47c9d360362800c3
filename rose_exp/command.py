"""Checking a whole command line, every job of a sweep included, before any of it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import SettingsError, suggest
from .settings import read_settings


def config_folder() -> Path:
    """The configuration files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def check_command(arguments: Sequence[str]) -> None:
    """Compose and check every job that a command line stands for, running none.

    Raises:
        SettingsError: with all mistakes of all jobs.
    """
    parsed = get_args_parser().parse_args(arguments)
    only_shown = (parsed.help, parsed.hydra_help, parsed.cfg, parsed.info, parsed.shell_completion)
    if any(only_shown) or parsed.experimental_rerun:
        return
    with initialize_config_dir(str(parsed.config_dir or config_folder()), version_base="1.3"):
        overrides, problems = _sound_overrides(parsed.overrides)
        for job in _jobs(overrides, parsed.multirun):
            problems += [problem for problem in _job_problems(job) if problem not in problems]
    if problems:
        raise SettingsError(problems)


def swept_settings(arguments: Sequence[str]) -> set[str]:
    """The settings that a sound command line gives several values."""
    parser = OverridesParser.create()
    overrides = [parser.parse_override(text) for text in get_args_parser().parse_args(arguments).overrides]
    return {override.key_or_group for override in overrides if override.is_sweep_override()}


def _sound_overrides(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Sort the overrides into those that can be composed and what is wrong with the others."""
    sound: list[Override] = []
    problems: list[str] = []
    parser = OverridesParser.create()
    parsed = []
    for text in texts:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            problems.append(f"{text!r} is no override: expected setting=value ({str(error).splitlines()[0]})")
    known = _settings_of([o for o in parsed if _is_group(o) and not _group_problems(o)])
    for override in parsed:
        found = _group_problems(override) if _is_group(override) else _key_problems(override, known)
        problems += found
        if not found:
            sound.append(override)
    return sound, problems


def _is_group(override: Override) -> bool:
    return bool(_options(override.key_or_group))


def _options(group: str) -> list[str]:
    found = GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)
    return [name for name in found if not name.startswith("_")]


def _group_problems(override: Override) -> list[str]:
    if override.is_delete():
        return []
    options = _options(override.key_or_group)
    problems = []
    for choice in _choices(override):
        for name in choice if isinstance(choice, list) else [choice]:
            if name is not None and str(name) not in options:
                expected = f"one of {', '.join(options)}"
                problems.append(f"{override.key_or_group}: expected {expected}, got {str(name)!r}{suggest(name, options)}")
    return problems


def _choices(override: Override) -> Iterable[Any]:
    return override.sweep_iterator() if override.is_sweep_override() else [override.value()]


def _settings_of(groups: Sequence[Override]) -> DictConfig:
    """A configuration that has every setting which these choices of groups bring."""
    first = [_as_text(override, next(iter(_choices(override)), None)) for override in groups]
    return compose("config", overrides=first)


def _key_problems(override: Override, known: DictConfig) -> list[str]:
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or key.split(".")[0] == "hydra":
        return []
    names = _all_names(known)
    if key in names or OmegaConf.select(known, key, throw_on_missing=False) is not None:
        return []
    groups = GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)
    return [f"{key}: no such setting{suggest(key, [*names, *groups])}"]


def _all_names(config: DictConfig, prefix: str = "") -> list[str]:
    names = []
    for key in config:
        names.append(f"{prefix}{key}")
        if OmegaConf.is_missing(config, key):
            continue
        value = config._get_node(key)
        if isinstance(value, DictConfig):
            names += _all_names(value, f"{prefix}{key}.")
    return names


def _jobs(overrides: Sequence[Override], multirun: bool) -> Iterable[list[str]]:
    """The overrides of each job, those that ``hydra.sweeper.params`` of an experiment brings included."""
    single = [o.input_line for o in overrides if not o.is_sweep_override()]
    axes = [[_as_text(o, value) for value in o.sweep_iterator()] for o in overrides if o.is_sweep_override()]
    if multirun:
        given = {override.key_or_group for override in overrides}
        try:
            params = compose("config", overrides=single, return_hydra_config=True).hydra.sweeper.get("params") or {}
        except (HydraException, OmegaConfBaseException):
            params = {}  # checking the job itself tells what is wrong
        parser = OverridesParser.create()
        for name, values in params.items():
            override = parser.parse_override(f"{name}={values}")
            if name not in given:
                axes.append([_as_text(override, value) for value in _choices(override)])
    for combination in itertools.product(*axes):
        yield [*single, *combination]


def _as_text(override: Override, value: Any) -> str:
    """``setting=value`` of one value of an override."""
    if not override.is_sweep_override() and override.input_line:
        return override.input_line
    key = override.get_key_element()
    quoted = Override._get_value_element_as_str(value)
    return f"{key}={quoted}"


def _job_problems(overrides: Sequence[str]) -> list[str]:
    try:
        config = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
        read_settings(config)
    except SettingsError as error:
        return error.problems
    except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
        return [" ".join(str(error).split())]
    return []
