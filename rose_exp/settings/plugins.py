"""Pruning methods and scores of other packages, through the entry point groups ``rose_exp.methods`` and ``rose_exp.scores``.

A method is a frozen dataclass derived from :class:`rose_exp.engine.Method`; its fields are its options. A score is a function
from a :class:`rose_exp.engine.methods.Layer` to the expected losses of its weights, (columns, rows). The name of the entry
point is the name of the method or the score.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import cache
from typing import Any

from ..engine import METHODS, Method
from ..engine.scores import SCORES
from ..runtime.errors import RoseExpError
from ..runtime.plugins import Plugin, plugins
from .pruning import DENSE

GROUPS = {"rose_exp.methods": METHODS, "rose_exp.scores": SCORES}


@cache
def install_plugins() -> dict[str, dict[str, Plugin]]:
    """Add the methods and scores of other packages to those of the engine, once in a process.

    Returns:
        For each group, the plugins by name.
    Raises:
        RoseExpError: an entry point cannot be loaded, has a name that exists, or is not a method or a score.
    """
    installed: dict[str, dict[str, Plugin]] = {}
    for group, known in GROUPS.items():
        installed[group] = {}
        for plugin in plugins(group):
            _check(plugin, known)
            if plugin.name in installed[group]:
                other = installed[group][plugin.name]
                raise RoseExpError(f"{plugin.where}: expected a name of its own, got that of {other.source}")
            installed[group][plugin.name] = plugin
    for group, known in GROUPS.items():  # after all checks, so that an error leaves no half of them
        known |= {name: plugin.value for name, plugin in installed[group].items()}
    return installed


def _check(plugin: Plugin, known: dict[str, Any]) -> None:
    if plugin.name in known or plugin.name == DENSE:
        raise RoseExpError(f"{plugin.where}: expected a new name, got {plugin.name}, which exists")
    if not plugin.name.isidentifier():
        raise RoseExpError(f"{plugin.where}: expected a name of letters, digits and underscores, got {plugin.name!r}")
    got = f"{type(plugin.value).__name__} {getattr(plugin.value, '__qualname__', plugin.value)}"
    if known is SCORES and not callable(plugin.value):
        raise RoseExpError(f"{plugin.where}: expected a function, got {got}")
    is_method = isinstance(plugin.value, type) and issubclass(plugin.value, Method) and is_dataclass(plugin.value)
    if known is METHODS and not is_method:
        raise RoseExpError(f"{plugin.where}: expected a dataclass derived from rose_exp.engine.Method, got {got}")


def used_plugins(method: str, score: str) -> dict[str, str]:
    """Return the source and the fingerprint of a method and a score that other packages provide."""
    names = {"rose_exp.methods": method, "rose_exp.scores": score}
    used = {group: install_plugins()[group].get(name) for group, name in names.items()}
    return {group: f"{plugin.source}, SHA-256 {plugin.sha256[:16]}" for group, plugin in used.items() if plugin is not None}
