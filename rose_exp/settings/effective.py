"""Which settings of a configuration can change which of its results, according to :data:`rose_exp.settings.effects.EFFECTS`.

Run IDs, reports, labels, time estimates, resuming and the sharing of the first block's moments call these functions. They take
a configuration as nested mappings: the resolved configuration of a run record, or a dump of the typed settings. They parse
values like the typed settings, so configurations that parse to equal settings have equal effects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .effects import COMPONENTS, EVERYTHING, NOTHING, Effect, Mode, effect_of, without_effect
from .leaves import flat, leaves
from .pruning import DENSE
from .schema import Settings

OF_ANOTHER_VERSION = Effect(EVERYTHING)  # a setting in a record that this version does not have
WITHOUT_EFFECT = Effect(NOTHING)


@dataclass(frozen=True)
class Setting:
    """A setting of a configuration: its dotted ``name`` and its ``value``, normalized so that equal settings compare equal."""

    name: str
    value: Any
    effect: Effect
    chosen: str = ""  # the part of the name that the user chose


def effective(config: Mapping[str, Any], metric: str | None = None) -> dict[str, Any]:
    """Return the settings that can change a result of this configuration, by dotted name.

    Equal settings have equal values with equal serializations.

    Args:
        metric: return only the settings that can change this metric; if None, all settings with an effect.
    Raises:
        LookupError: :data:`EFFECTS` lacks a setting.
    """
    return {setting.name: setting.value for setting in settings_of(config, metric)}


def settings_of(config: Mapping[str, Any], metric: str | None = None, assumed: str = "") -> list[Setting]:
    """Return the settings that :func:`effective` returns, with their effects.

    Args:
        assumed: the setting or group whose values differ between the columns of a table. An option whose condition reads it
            counts as in effect, so that it is in all columns or in none.
    """
    all_settings = _read(config)
    values = {setting.name: setting.value for setting in all_settings}
    mode, effective_settings = _mode(values), []
    for setting in all_settings:
        effect, when = setting.effect, setting.effect.when
        if mode not in effect.modes or not _changes(setting, metric, mode):
            continue
        reads = [name.replace("*", setting.chosen) for name in when.reads] if when is not None else []
        if when is None or any(within(name, assumed) for name in reads) or when.holds(*(_value(values, n) for n in reads)):
            effective_settings.append(setting)
    return effective_settings


def acting(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the :data:`COMPONENTS` that have an effect in this configuration."""
    values = complete(config)
    mode = _mode(values)
    return frozenset(
        name
        for name, (modes, when) in COMPONENTS.items()
        if mode in modes and when.holds(*(_value(values, read) for read in when.reads))
    )


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings by dotted name, including those without effect. Missing settings have their defaults."""
    return {setting.name: setting.value for setting in _read(config)}


def within(name: str, other: str) -> bool:
    """Return whether the setting ``name`` is ``other`` or a part of it."""
    return name == other or name.startswith(f"{other}.")


def without(values: Mapping[str, Any], others: Iterable[str]) -> dict[str, Any]:
    """Return flat settings except those within any of ``others``."""
    left_out = tuple(others)
    return {name: value for name, value in values.items() if not _within_any(name, left_out)}


@cache
def _within_any(name: str, others: tuple[str, ...]) -> bool:
    return any(within(name, other) for other in others)


def _mode(values: Mapping[str, Any]) -> Mode:
    return values["model.kind"], values["method.name"] != DENSE


def _changes(setting: Setting, metric: str | None, mode: Mode) -> bool:
    """Return whether the setting can change ``metric`` if its condition holds."""
    effect = setting.effect
    names = effect.metrics if mode[1] or effect.of_dense is None else effect.of_dense
    return metric is None or names is None or any(within(metric, name.replace("*", setting.chosen)) for name in names)


def _value(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a setting or, for a group, whether the configuration has it."""
    return values[name] if name in values else any(within(other, name) for other in values)


def _read(config: Mapping[str, Any]) -> list[Setting]:
    settings: list[Setting] = []
    for leaf in leaves(Settings, {name: value for name, value in config.items() if name != "hydra"}):
        if leaf.known is None:
            harmless = _within_any(leaf.name, tuple(without_effect()))  # such as the options of another package's tracker
            settings.append(Setting(leaf.name, _plain(leaf.value), WITHOUT_EFFECT if harmless else OF_ANOTHER_VERSION))
        else:
            settings += _settings_in(leaf.name, leaf.value, effect_of(leaf.known), leaf.chosen)
    return settings


def _settings_in(name: str, value: Any, effect: Effect, chosen: str) -> Iterator[Setting]:
    """Yield a setting or, if it is a mapping whose order does not matter, the settings in it."""
    if isinstance(value, Mapping) and not effect.ordered:
        for item_name, item in flat(_plain(value), f"{name}.").items():
            yield Setting(item_name, item, effect, chosen)
        return
    if isinstance(value, Mapping):
        plain: Any = [[key, _plain(item)] for key, item in value.items()]
    else:
        plain = _plain(value)
    if effect.unordered and isinstance(plain, list):
        plain = sorted(set(plain))
    yield Setting(name, plain, effect, chosen)


def _plain(value: Any) -> Any:
    """Normalize a value, so that values of equal settings are equal and have equal serializations."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value, key=str)}
    return value
