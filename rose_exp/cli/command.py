"""Checks a whole command line, including every job of a sweep, before any job runs."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.utils import (
    create_automatic_config_search_path,
    detect_calling_file_or_module_from_task_function,
    get_args_parser,
    validate_config_path,
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..runs.identity import register_resolver
from ..runtime.errors import RoseExpError, SettingsError, suggest
from ..settings.schema import read_settings
from ..sweeps.job import Job
from .hydra_files import stored_secrets
from .paths import config_folder

register_resolver()  # configuration files use it

CONFIG_NAME = "config"
VERSION_BASE = "1.3"  # of Hydra
JOB = SimpleNamespace(__module__=f"{__package__}.app")  # the module of the function that Hydra runs
SEVERAL = ("evaluation",)  # groups that allow several choices in one run


@dataclass(frozen=True)
class Command:
    """A command line without errors.

    Attributes:
        jobs: all jobs; empty for a command that only prints information. For a search, the jobs at the ends of the searched
            intervals.
        swept: settings with several values.
        sweep: the folder that holds the folders of a sweep's jobs; None for a single run.
        searched: whether a sweeper chooses the jobs while it runs.
    """

    jobs: list[Job]
    swept: set[str]
    sweep: Path | None
    searched: bool

    @property
    def planned(self) -> bool:
        """Whether the command lists its jobs instead of running them."""
        return any(job.settings.plan for job in self.jobs)

    def without_multirun(self) -> str | None:
        """Return the error of a command that gives a setting several values but not ``-m``, if it is one."""
        if self.sweep is not None or not self.swept:
            return None
        swept = sorted(self.swept)
        lists = [name for name in swept if name in SEVERAL]
        hint = f"; {lists[0]}=[a,b] gives one run both" if lists else ""
        return f"{', '.join(swept)}: expected one value, got several; add -m to run one job per value{hint}"


def check_command(arguments: Sequence[str]) -> Command:
    """Compose and check every job of a command line. Nothing runs.

    Raises:
        SettingsError: with all errors of all jobs.
    """
    parsed = get_args_parser().parse_args(arguments)
    if parsed.experimental_rerun:
        raise SettingsError(["--experimental-rerun: not supported; give the settings of the run, and rerun=true"])
    if any((parsed.help, parsed.hydra_help, parsed.cfg, parsed.info, parsed.shell_completion)):
        return Command([], set(), None, False)
    composer = _Composer(parsed)
    overrides, problems = _valid_overrides(composer, parsed.overrides)
    hydra_config = _hydra_config(composer, overrides) if composer.multirun else None
    problems += stored_secrets(hydra_config.launcher._target_, parsed.overrides) if hydra_config is not None else []
    single, axes = _axes(composer, overrides, hydra_config)
    jobs = []
    for combination in itertools.product(*axes):
        result = _job(composer, [*single, *combination], list(combination))
        jobs += [result] if isinstance(result, Job) else []
        problems += [p for p in result if p not in problems] if isinstance(result, list) else []
    if problems:
        raise SettingsError(problems)
    swept = {axis[0].partition("=")[0].lstrip("+~") for axis in axes if axis}
    sweep = Path(hydra_config.sweep.dir) if hydra_config is not None else None
    return Command(jobs, swept, sweep, hydra_config is not None and "BasicSweeper" not in hydra_config.sweeper._target_)


class _Loader(ConfigLoaderImpl):
    """Records the configuration files from which the last configuration was composed."""

    defaults: Sequence[ResultDefault] = ()

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        self.defaults = defaults
        return super()._compose_config_from_defaults_list(defaults, repo)


class _Composer:
    """Composes configurations as Hydra does for the same command line.

    Attributes:
        multirun: whether Hydra runs several jobs.
    """

    def __init__(self, parsed: argparse.Namespace):
        version.setbase(VERSION_BASE)
        setup_globals()
        self.name = parsed.config_name or CONFIG_NAME
        self.parser = OverridesParser.create()
        try:
            self.loader = _Loader(_search_path(parsed))
            self.parser = OverridesParser.create(self.loader)
            # the only override that changes the search path of configuration files
            self.always = [text for text in parsed.overrides if text.lstrip("+").startswith("hydra.searchpath=")]
            self.compose([])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise SettingsError([f"cannot read the configuration {self.name}: {_one_line(error)}"]) from error
        self.multirun = parsed.multirun or self._mode(parsed.overrides) == RunMode.MULTIRUN

    def compose(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """Return the configuration with Hydra's own part."""
        return self.loader.load_configuration(self.name, self._with_search_path(overrides), mode, from_shell=False)

    def resolve(self, config: DictConfig) -> dict[str, Any]:
        """Return the part of a composed configuration that is not Hydra's, resolved."""
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)  # for ${hydra:…}
        try:
            nodes = {name: config._get_node(name) for name in config if name != "hydra"}
            return OmegaConf.to_container(OmegaConf.masked_copy(config, list(nodes)), resolve=True)
        finally:
            HydraConfig.instance().cfg = before

    def merged(self) -> dict[str, list[str]]:
        """Return the groups of which the last configuration merges several choices, with these choices."""
        choices: dict[str, dict[str, None]] = {}
        for default in self.loader.defaults:
            group, _, choice = (default.config_path or "").rpartition("/")
            built_upon = group == (default.parent or "").rpartition("/")[0]  # by another choice of the group
            if group and not built_upon and default.package in ("", group.replace("/", ".")):  # "": the whole configuration
                choices.setdefault(group, {})[choice] = None
        return {group: list(names) for group, names in choices.items() if len(names) > 1}

    def options(self, group: str, kind: ObjectType = ObjectType.CONFIG) -> list[str]:
        """Return the choices of a group."""
        names = self.loader.get_group_options(group, kind, self.name, self.always)
        return [name for name in names if not name.startswith("_")]

    def _mode(self, overrides: Sequence[str]) -> RunMode | None:
        """Return ``hydra.mode`` if the configuration sets it."""
        try:
            return self.loader.load_configuration(
                self.name, list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False
            ).hydra.mode
        except (HydraException, OmegaConfBaseException):  # checking a job reports the reason
            return None

    def _with_search_path(self, overrides: Sequence[str]) -> list[str]:
        return [*overrides, *(text for text in self.always if text not in overrides)]


def _search_path(parsed: argparse.Namespace) -> Any:
    """Return Hydra's search path for ``--config-path`` and ``--config-dir``."""
    path = parsed.config_path or str(config_folder())
    validate_config_path(path)
    search_path = create_automatic_config_search_path(*detect_calling_file_or_module_from_task_function(JOB), path)
    if parsed.config_dir is not None:
        folder = os.path.abspath(parsed.config_dir)
        if not os.path.isdir(folder):
            raise SettingsError([f"--config-dir: expected a folder that exists, got {parsed.config_dir!r}"])
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return search_path


def _valid_overrides(composer: _Composer, texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Separate the overrides that can be composed from the errors of the others."""
    valid: list[Override] = []
    problems: list[str] = []
    parsed: list[Override] = []
    for text in texts:
        try:
            override = composer.parser.parse_override(text)
        except HydraException as error:
            problems.append(f"{text!r} is no override: expected setting=value ({str(error).splitlines()[0]})")
            continue
        key = override.get_key_element()
        parsed = [o for o in parsed if o.is_delete() or o.get_key_element() != key]  # the last one counts
        parsed.append(override)
    groups = {override.key_or_group for override in parsed if composer.options(override.key_or_group)}
    config = _settings_of(composer, [o for o in parsed if o.key_or_group in groups and not _group_problems(composer, o)])
    for override in parsed:
        in_group = override.key_or_group in groups
        override_problems = _group_problems(composer, override) if in_group else _key_problems(composer, override, config)
        problems += override_problems
        if not override_problems:
            valid.append(override)
    return valid, problems


def _group_problems(composer: _Composer, override: Override) -> list[str]:
    if override.is_delete():
        return []
    group = override.key_or_group
    options = composer.options(group)
    problems = []
    for choice in _choices(override):
        if isinstance(choice, list) and group not in SEVERAL:
            problems.append(_choices_error(group, [str(name) for name in choice]))
            continue
        for name in choice if isinstance(choice, list) else [choice]:
            if name is not None and str(name) not in options:
                expected = f"one of {', '.join(options)}"
                problems.append(f"{group}: expected {expected}, got {str(name)!r}{suggest(name, options)}")
    return problems


def _choices_error(group: str, names: Sequence[str]) -> str:
    """Return the error of a run with several choices of a group."""
    listed = f"{group}: expected one choice, got the list [{', '.join(names)}]"
    if len(names) == 1:
        return f"{listed}; give {group}={names[0]}"
    return f"{listed}, whose settings would be mixed; -m {group}={','.join(names)} runs one job per choice"


def _choices(override: Override) -> Iterable[Any]:
    """Return all values of an override or, for a searched interval, its ends."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.is_interval_sweep():
        return [override.value().start, override.value().end]
    return override.sweep_iterator()


def _settings_of(composer: _Composer, groups: Sequence[Override]) -> DictConfig:
    """Compose a configuration with all settings of these choices."""
    first = [_as_text(override, next(iter(_choices(override)), None)) for override in groups]
    try:
        return composer.compose(first)
    except (HydraException, OmegaConfBaseException):  # checking a job reports the reason
        return composer.compose([])


def _key_problems(composer: _Composer, override: Override, config: DictConfig) -> list[str]:
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or key.split(".")[0] == "hydra":
        return []
    names = _all_names({name: config._get_node(name) for name in config if name != "hydra"})
    if key in names or OmegaConf.select(config, key, throw_on_missing=False) is not None:
        return []
    groups = composer.options("", ObjectType.GROUP)
    return [f"{key}: no such setting{suggest(key, [*names, *groups])}"]


def _all_names(nodes: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, node in nodes.items():
        names.append(f"{prefix}{key}")
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            names += _all_names({name: node._get_node(name) for name in node}, f"{prefix}{key}.")
    return names


def _hydra_config(composer: _Composer, overrides: Sequence[Override]) -> DictConfig | None:
    """Return Hydra's own settings, or None if they cannot be composed. Checking a job then reports the reason."""
    single = [o.input_line for o in overrides if not o.is_sweep_override()]
    try:
        return composer.compose(single).hydra
    except (HydraException, OmegaConfBaseException):
        return None


def _axes(
    composer: _Composer, overrides: Sequence[Override], hydra_config: DictConfig | None
) -> tuple[list[str], list[list[str]]]:
    """Return the overrides that all jobs share and, for each setting with several values, one override per value.

    Includes the settings in ``hydra.sweeper.params``.
    """
    single = [o.input_line for o in overrides if not o.is_sweep_override()]
    names_given = {override.key_or_group for override in overrides}
    params = (hydra_config.sweeper.get("params") or {}) if hydra_config is not None else {}
    added = [composer.parser.parse_override(f"{name}={values}") for name, values in params.items() if name not in names_given]
    swept = [override for override in [*overrides, *added] if override.is_sweep_override()]
    single += [override.input_line for override in added if not override.is_sweep_override()]
    return single, [[_as_text(override, value) for value in _choices(override)] for override in swept]


def _as_text(override: Override, value: Any) -> str:
    """Return ``setting=value`` for one value of an override."""
    if not override.is_sweep_override() and override.input_line:
        return override.input_line
    key = override.get_key_element()
    quoted = Override._get_value_element_as_str(value)
    return f"{key}={quoted}"


def _job(composer: _Composer, overrides: Sequence[str], swept: Sequence[str]) -> Job | list[str]:
    """Return one job, or its errors."""
    try:
        composed = composer.compose(overrides)
        if mixed := {group: names for group, names in composer.merged().items() if group not in SEVERAL}:
            return [_choices_error(group, names) for group, names in mixed.items()]
        config = composer.resolve(composed)
        settings = read_settings(config)
    except SettingsError as error:
        return error.problems
    except (HydraException, OmegaConfBaseException) as error:
        return [_one_line(error)]
    job = Job(" ".join(swept) or f"{settings.label} {settings.model.name} {settings.sparsity.parsed}", settings, config)
    try:
        job.run_id  # noqa: B018  (cached: reads every file that the settings name)
    except RoseExpError as error:
        return [str(error)]
    return job


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
