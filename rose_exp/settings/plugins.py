"""Parts that other packages provide through entry points: pruning methods, scores, experiment trackers and data sets.

The name of the entry point is the name of the part in the configuration:

* ``rose_exp.methods``: a frozen dataclass derived from :class:`rose_exp.engine.Method`; its fields are its options.
* ``rose_exp.scores``: a function from a :class:`rose_exp.engine.methods.Layer` to the expected losses of its weights,
  (columns, rows).
* ``rose_exp.trackers``: a class with the methods of :class:`rose_exp.tracking.Tracker`; its keyword arguments are its options.
* ``rose_exp.datasets``: a function without arguments that returns the documents of a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from ..engine import METHODS, Method
from ..engine.scores import SCORES
from ..runtime.errors import RoseExpError
from ..runtime.plugins import Plugin, plugins
from .pruning import DENSE
from .tracker_options import options_class

TRACKERS = ("wandb", "tensorboard", "csv", "accelerate")  # of this package
DATASETS_GROUP, TRACKERS_GROUP = "rose_exp.datasets", "rose_exp.trackers"
ENGINE_GROUPS = {"rose_exp.methods": METHODS, "rose_exp.scores": SCORES}


@cache
def install_plugins() -> dict[str, dict[str, Plugin]]:
    """Load and check the parts of other packages, and add methods and scores to those of the engine, once in a process.

    Returns:
        For each group, the plugins by name.
    Raises:
        RoseExpError: an entry point cannot be loaded, has a name that exists, or is not what its group requires.
    """
    installed: dict[str, dict[str, Plugin]] = {}
    for group, check in CHECKS.items():
        installed[group] = {}
        for plugin in plugins(group):
            _check_name(plugin, group)
            check(plugin)
            if plugin.name in installed[group]:
                other = installed[group][plugin.name]
                raise RoseExpError(f"{plugin.where}: expected a name of its own, got that of {other.source}")
            installed[group][plugin.name] = plugin
    for group, known in ENGINE_GROUPS.items():  # after all checks, so that an error leaves no half of them
        known |= {name: plugin.value for name, plugin in installed[group].items()}
    return installed


def _check_name(plugin: Plugin, group: str) -> None:
    reserved = {"rose_exp.methods": (*METHODS, DENSE), "rose_exp.scores": tuple(SCORES), TRACKERS_GROUP: (*TRACKERS, "none")}
    if plugin.name in reserved.get(group, ()):
        raise RoseExpError(f"{plugin.where}: expected a new name, got {plugin.name}, which exists")
    if not plugin.name.isidentifier():
        raise RoseExpError(f"{plugin.where}: expected a name of letters, digits and underscores, got {plugin.name!r}")


def _check_method(plugin: Plugin) -> None:
    if not (isinstance(plugin.value, type) and issubclass(plugin.value, Method) and is_dataclass(plugin.value)):
        expected = "a dataclass derived from rose_exp.engine.Method"
        raise RoseExpError(f"{plugin.where}: expected {expected}, got {_described(plugin.value)}")


def _check_function(plugin: Plugin) -> None:
    if not callable(plugin.value):
        raise RoseExpError(f"{plugin.where}: expected a function, got {_described(plugin.value)}")


def _check_dataset(plugin: Plugin) -> None:
    _check_function(plugin)
    try:
        inspect.signature(plugin.value).bind()
    except (TypeError, ValueError) as error:
        raise RoseExpError(f"{plugin.where}: expected a function without required arguments, got one with {error}") from error


def _check_tracker(plugin: Plugin) -> None:
    methods = ("start", "layer", "results", "figure", "keep", "finish")
    missing = [name for name in methods if not callable(getattr(plugin.value, name, None))]
    if not isinstance(plugin.value, type) or missing:
        expected = f"a class with the methods {', '.join(methods)}"
        raise RoseExpError(f"{plugin.where}: expected {expected}, got {_described(plugin.value)}")
    options_class(plugin)


CHECKS: dict[str, Callable[[Plugin], None]] = {
    "rose_exp.methods": _check_method,
    "rose_exp.scores": _check_function,
    TRACKERS_GROUP: _check_tracker,
    DATASETS_GROUP: _check_dataset,
}


def _described(value: Any) -> str:
    return f"{type(value).__name__} {getattr(value, '__qualname__', value)}"


def used_plugins(method: str, score: str, datasets: Iterable[str] = ()) -> dict[str, Any]:
    """Return the sources and fingerprints of the parts of other packages that a run uses, by group; data sets also by name."""
    installed = install_plugins()
    names = {"rose_exp.methods": method, "rose_exp.scores": score}
    used: dict[str, Any] = {group: _identity(installed[group][n]) for group, n in names.items() if n in installed[group]}
    known = installed[DATASETS_GROUP]
    texts = {name: _identity(known[name]) for name in sorted(set(datasets)) if name in known}
    return used | ({DATASETS_GROUP: texts} if texts else {})


def _identity(plugin: Plugin) -> str:
    return f"{plugin.source}, SHA-256 {plugin.sha256[:16]}"
