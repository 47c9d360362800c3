"""Configuration choices of other packages, and Hydra plugins with the names of this project's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from ..runtime.errors import RoseExpError, SettingsError
from ..runtime.plugins import Plugin
from ..settings.plugins import DATASETS_GROUP, TRACKERS_GROUP, install_plugins
from ..settings.tracker_options import default_options
from .paths import config_folder

OWN = (("sweeper", "optuna"),)  # of which the target is a class of this project


def prefer_own_files() -> None:
    """Remove the schemas that plugins register under the names of this project's files with other classes.

    Otherwise, Hydra would validate the files against these schemas. hydra-optuna-sweeper registers ``hydra/sweeper: optuna``.
    """
    Plugins.instance()  # imports the plugins, which register their schemas
    groups = ConfigStore.instance().repo.get("hydra", {})
    for group, name in OWN:
        groups.get(group, {}).pop(f"{name}.yaml", None)


def add_choices() -> None:
    """Make methods, trackers and data sets of other packages choices of their groups. A file takes precedence over a method.

    Raises:
        SettingsError: an entry point is broken, or a data set has the name of a file.
    """
    try:
        installed = install_plugins()
        for group, nodes in NODES.items():
            for plugin in installed[group].values():
                for config_group, node in nodes(plugin).items():
                    ConfigStore.instance().store(group=config_group, name=plugin.name, node=node, provider=plugin.source)
    except RoseExpError as error:
        raise SettingsError([str(error)]) from error


def _of_method(plugin: Plugin) -> dict[str, Any]:
    """Return the configuration of a choice for each group that has it."""
    options = {field.name: field.default for field in fields(plugin.value) if field.default is not MISSING}
    return {"method": {"name": plugin.name, "options": options, "layer_options": {}}}


def _of_tracker(plugin: Plugin) -> dict[str, Any]:
    return {"tracking": {plugin.name: default_options(plugin)}}


def _of_dataset(plugin: Plugin) -> dict[str, Any]:
    name = plugin.name
    for group in ("calibration", "evaluation"):
        if (config_folder() / group / f"{name}.yaml").exists():
            raise RoseExpError(f"{plugin.where}: expected a new name, got {name}, which exists in the group {group}")
    text = {"plugin": name, "window": 2048, "windows": None}
    return {
        "calibration": {"defaults": ["local", "_self_"], "plugin": name},
        "evaluation": {
            "defaults": [f"/calibration/_text@perplexity.{name}", "_self_"],
            "perplexity": {name: text},
            "batch": 1,
        },
    }


NODES: dict[str, Callable[[Plugin], dict[str, Any]]] = {
    "rose_exp.methods": _of_method,
    TRACKERS_GROUP: _of_tracker,
    DATASETS_GROUP: _of_dataset,
}
