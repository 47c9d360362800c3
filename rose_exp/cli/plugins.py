"""Configuration choices of other packages: methods of plugins, and Hydra plugins with the names of this project's files."""

from __future__ import annotations

from dataclasses import MISSING, fields

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from ..runtime.errors import RoseExpError, SettingsError
from ..settings.plugins import install_plugins

OWN = (("sweeper", "optuna"),)  # of which the target is a class of this project


def prefer_own_files() -> None:
    """Remove the schemas that plugins register under the names of this project's files with other classes.

    Otherwise, Hydra would validate the files against these schemas. hydra-optuna-sweeper registers ``hydra/sweeper: optuna``.
    """
    Plugins.instance()  # imports the plugins, which register their schemas
    groups = ConfigStore.instance().repo.get("hydra", {})
    for group, name in OWN:
        groups.get(group, {}).pop(f"{name}.yaml", None)


def add_methods() -> None:
    """Make the pruning methods of other packages choices of the group ``method``, unless a file defines the choice.

    Raises:
        SettingsError: an entry point is broken.
    """
    try:
        installed = install_plugins()
    except RoseExpError as error:
        raise SettingsError([str(error)]) from error
    for name, plugin in installed["rose_exp.methods"].items():
        options = {field.name: field.default for field in fields(plugin.value) if field.default is not MISSING}
        node = {"name": name, "options": options, "layer_options": {}}
        ConfigStore.instance().store(group="method", name=name, node=node, provider=plugin.source)
