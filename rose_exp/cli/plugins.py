"""Installed plugins of Hydra that have the same names as this project's configuration files."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

OWN = (("sweeper", "optuna"),)  # of which the target is a class of this project


def prefer_own_files() -> None:
    """Remove the schemas that plugins register under the names of this project's files with other classes.

    Otherwise, Hydra would validate the files against these schemas. hydra-optuna-sweeper registers ``hydra/sweeper: optuna``.
    """
    Plugins.instance()  # imports the plugins, which register their schemas
    groups = ConfigStore.instance().repo.get("hydra", {})
    for group, name in OWN:
        groups.get(group, {}).pop(f"{name}.yaml", None)
