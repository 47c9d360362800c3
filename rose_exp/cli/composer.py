"""Composes configurations as Hydra does, without running anything."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.utils import (
    create_automatic_config_search_path,
    detect_calling_file_or_module_from_task_function,
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
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..runs.identity import register_resolver
from ..runtime.errors import SettingsError
from ..settings.messages import UNQUOTED_PATTERN
from .paths import config_folder
from .plugins import add_choices, prefer_own_files

register_resolver()  # configuration files use it

CONFIG_NAME = "config"
VERSION_BASE = "1.3"  # of Hydra
JOB = SimpleNamespace(__module__=f"{__package__}.app")  # the module of the function that Hydra runs
RUN_ID = "{run_id}"  # stands for the run ID in a folder's name

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError)
"""What Hydra raises for configuration files and overrides that cannot be composed."""


class _Loader(ConfigLoaderImpl):
    """Records the configuration files from which the last configuration was composed."""

    defaults: Sequence[ResultDefault] = ()

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        self.defaults = defaults
        return super()._compose_config_from_defaults_list(defaults, repo)


class Composer:
    """Composes configurations as Hydra does for the same command line.

    Attributes:
        multirun: whether Hydra runs several jobs.
    """

    def __init__(self, parsed: argparse.Namespace):
        version.setbase(VERSION_BASE)
        setup_globals()
        prefer_own_files()
        add_choices()
        self.name = parsed.config_name or CONFIG_NAME
        self.parser = OverridesParser.create()
        try:
            self.loader = _Loader(_search_path(parsed))
            self.parser = OverridesParser.create(self.loader)
            # the only override that changes the search path of configuration files
            self.always = [text for text in parsed.overrides if text.lstrip("+").startswith("hydra.searchpath=")]
            self.compose([])
        except COMPOSITION_ERRORS as error:
            raise SettingsError([f"cannot read the configuration {self.name}: {one_line(error)}"]) from error
        self.multirun = parsed.multirun or self._mode(parsed.overrides) == RunMode.MULTIRUN

    def compose(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """Return the configuration with Hydra's own part."""
        return self.loader.load_configuration(self.name, self._with_search_path(overrides), mode, from_shell=False)

    def resolve(self, config: DictConfig) -> dict[str, Any]:
        """Return the part of a composed configuration that is not Hydra's, resolved."""
        nodes = [name for name in config if name != "hydra"]
        with _as_hydra_config(config):
            return OmegaConf.to_container(OmegaConf.masked_copy(config, nodes), resolve=True)

    def run_folder(self, config: DictConfig, number: int) -> str | None:
        """Return the folder of a job with :data:`RUN_ID` in place of its run ID, or None if Hydra computes it later.

        The folder of a sweep's job is relative to that of the sweep.

        Args:
            number: the job's number in the sweep.
        """
        config = config.copy()
        node, name = (config.hydra.sweep, "subdir") if self.multirun else (config.hydra.run, "dir")
        for part in (config.hydra, config.hydra.job, node):
            OmegaConf.set_readonly(part, False)
        with open_dict(config.hydra), _as_hydra_config(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
            node[name] = str(node._get_node(name)._value()).replace("${run_id:}", RUN_ID)
            try:
                return str(node[name])
            except OmegaConfBaseException:
                return None

    def merged(self) -> dict[str, list[str]]:
        """Return the groups of which the last configuration merges several choices, with these choices."""
        choices: dict[str, dict[str, None]] = {}
        for default in self.loader.defaults:
            group, _, choice = (default.config_path or "").rpartition("/")
            built_upon = group == (default.parent or "").rpartition("/")[0]  # by another choice of the group
            if group and not built_upon and default.package in ("", group.replace("/", ".")):  # "": the whole configuration
                choices.setdefault(group, {})[choice] = None
        return {group: list(names) for group, names in choices.items() if len(names) > 1}

    def parse(self, text: str) -> Override:
        """Parse one override.

        Raises:
            HydraException: the text is no override.
        """
        override = self.parser.parse_override(text)
        override.config_loader = self.loader  # for glob(…)
        return override

    def options(self, group: str, kind: ObjectType = ObjectType.CONFIG) -> list[str]:
        """Return the choices of a group."""
        return [name for name in self._repository.get_group_options(group, kind) if not name.startswith("_")]

    @cached_property
    def _repository(self) -> IConfigRepository:
        """The configuration files on the search path. Hydra's own ``get_group_options`` creates it again for each call."""
        return self.loader._parse_overrides_and_create_caching_repo(self.name, self.always)[1]

    def _mode(self, overrides: Sequence[str]) -> RunMode | None:
        """Return ``hydra.mode`` if the configuration sets it."""
        try:
            return self.loader.load_configuration(
                self.name, list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False
            ).hydra.mode
        except COMPOSITION_ERRORS:  # checking a job reports the reason
            return None

    def _with_search_path(self, overrides: Sequence[str]) -> list[str]:
        return [*overrides, *(text for text in self.always if text not in overrides)]


@contextmanager
def _as_hydra_config(config: DictConfig) -> Iterator[None]:
    """Let ``${hydra:…}`` refer to this configuration while the body runs."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


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


def one_line(error: Exception) -> str:
    """Return an error's message in one line, with a hint if YAML has read an unquoted N:M pattern as a number."""
    message = " ".join(str(error).split())
    return f"{message}; {UNQUOTED_PATTERN}" if re.search(r"\b(Got|defaults :) int\b", message) else message
