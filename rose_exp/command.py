"""Checking a whole command line, every job of a sweep included, before any of it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
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

from .entry import config_folder
from .errors import SettingsError, suggest
from .run_id import register_resolver, run_id
from .settings import Settings, read_settings

register_resolver()  # what configuration files reckon with


@dataclass(frozen=True)
class Job:
    """One run that a command stands for.

    Attributes:
        name: what differs from the other jobs of the sweep; of a single run, the method, the model and the pattern.
        config: resolved.
    """

    name: str
    settings: Settings
    config: dict[str, Any]

    @cached_property
    def run_id(self) -> str:
        return run_id(self.settings)


@dataclass(frozen=True)
class Command:
    """A sound command line.

    Attributes:
        jobs: all that it stands for; none where it only shows something. Of a search, jobs at the ends of what is searched.
        swept: settings with several values.
        sweep: folder in which the jobs of a sweep have theirs; None: a single run.
        searched: whether a sweeper chooses the jobs as it goes.
    """

    jobs: list[Job]
    swept: set[str]
    sweep: Path | None
    searched: bool

    @property
    def planned(self) -> bool:
        """Whether the jobs are to be listed and not run."""
        return any(job.settings.plan for job in self.jobs)


def check_command(arguments: Sequence[str]) -> Command:
    """Compose and check every job that a command line stands for, running none.

    Raises:
        SettingsError: with all mistakes of all jobs.
    """
    parsed = get_args_parser().parse_args(arguments)
    only_shown = (parsed.help, parsed.hydra_help, parsed.cfg, parsed.info, parsed.shell_completion)
    if any(only_shown) or parsed.experimental_rerun:
        return Command([], set(), None, False)
    with initialize_config_dir(str(parsed.config_dir or config_folder()), version_base="1.3"):
        overrides, problems = _sound_overrides(parsed.overrides)
        hydra_config = _hydra_config(overrides) if parsed.multirun else None
        single, axes = _axes(overrides, hydra_config)
        jobs = []
        for combination in itertools.product(*axes):
            found = _job([*single, *combination], list(combination))
            jobs += [found] if isinstance(found, Job) else []
            problems += [p for p in found if p not in problems] if isinstance(found, list) else []
    if problems:
        raise SettingsError(problems)
    swept = {axis[0].partition("=")[0].lstrip("+~") for axis in axes if axis}
    sweep = Path(hydra_config.sweep.dir) if hydra_config is not None else None
    return Command(jobs, swept, sweep, hydra_config is not None and "BasicSweeper" not in hydra_config.sweeper._target_)


def _sound_overrides(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Sort the overrides into those that can be composed and what is wrong with the others."""
    sound: list[Override] = []
    problems: list[str] = []
    parser = OverridesParser.create()
    parsed = []
    for text in texts:
        try:
            override = parser.parse_override(text)
            parsed = [
                o for o in parsed if o.is_delete() or o.get_key_element() != override.get_key_element()
            ]  # the last counts
            parsed.append(override)
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
    """All values of an override; of an interval that is searched, its ends."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.is_interval_sweep():
        return [override.value().start, override.value().end]
    return override.sweep_iterator()


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


def _hydra_config(overrides: Sequence[Override]) -> DictConfig | None:
    """Hydra's own settings; None where they cannot be composed, and checking a job will tell why."""
    single = [o.input_line for o in overrides if not o.is_sweep_override()]
    try:
        return compose("config", overrides=single, return_hydra_config=True).hydra
    except (HydraException, OmegaConfBaseException):
        return None


def _axes(overrides: Sequence[Override], hydra_config: DictConfig | None) -> tuple[list[str], list[list[str]]]:
    """What all jobs share, and the values of each setting that has several, those that ``hydra.sweeper.params`` of an
    experiment brings included; all as overrides."""
    single = [o.input_line for o in overrides if not o.is_sweep_override()]
    given = {override.key_or_group for override in overrides}
    parser = OverridesParser.create()
    params = (hydra_config.sweeper.get("params") or {}) if hydra_config is not None else {}
    brought = [parser.parse_override(f"{name}={values}") for name, values in params.items() if name not in given]
    swept = [override for override in [*overrides, *brought] if override.is_sweep_override()]
    single += [override.input_line for override in brought if not override.is_sweep_override()]
    return single, [[_as_text(override, value) for value in _choices(override)] for override in swept]


def _as_text(override: Override, value: Any) -> str:
    """``setting=value`` of one value of an override."""
    if not override.is_sweep_override() and override.input_line:
        return override.input_line
    key = override.get_key_element()
    quoted = Override._get_value_element_as_str(value)
    return f"{key}={quoted}"


def _job(overrides: Sequence[str], own: Sequence[str]) -> Job | list[str]:
    """One job, or its mistakes."""
    try:
        config = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
        settings = read_settings(config)
    except SettingsError as error:
        return error.problems
    except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
        return [" ".join(str(error).split())]
    name = " ".join(own) or f"{settings.label} {settings.model.name} {settings.sparsity.build()}"
    return Job(name, settings, config)
