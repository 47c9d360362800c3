"""Options have the same types, bounds and defaults in Python and on the command line."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic_core import PydanticUndefined

from rose_exp.cli.paths import config_folder
from rose_exp.engine import Allocation, EngineOptions, Ordering, Refine, Target
from rose_exp.runtime.errors import SettingsError
from rose_exp.settings.effects import effect_of
from rose_exp.settings.reconstruction import Reconstruction
from rose_exp.settings.schema import Settings, read_settings
from rose_exp.settings.section import fields_of, is_section

OPTION_CLASSES = {
    **{"engine": EngineOptions, "reorder": Ordering, "refine": Refine, "target": Target, "allocation": Allocation},
    "reconstruction": Reconstruction,
}
CHOSEN = {"model.embedded", "calibration.embedded", "sparsity.ratio"}  # set by the default configuration


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)


@pytest.mark.parametrize("name", OPTION_CLASSES)
def test_option_classes_and_configuration_have_equal_defaults(name):
    config = composed("method=rose")
    assert config[name] == dataclasses.asdict(OPTION_CLASSES[name]())


def test_settings_and_configuration_have_equal_defaults():
    pairs = dict(pairs_of(Settings, composed(), ""))
    assert len(pairs) > 60
    assert {name for name, (configured, default) in pairs.items() if configured != default} == CHOSEN


def pairs_of(section: type, values: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the configured value and the default of every setting that has a default."""
    for key, field in fields_of(section).items():
        default = field.get_default(call_default_factory=True)
        if is_section(field.annotation):
            yield from pairs_of(field.annotation, values.get(key, {}), f"{prefix}{key}.")
        elif key in values and default is not PydanticUndefined and get_origin(field.annotation) is not dict:
            yield f"{prefix}{key}", (values[key], default)


@pytest.mark.parametrize("name", OPTION_CLASSES)
def test_unknown_option_raises_an_error_that_suggests_the_nearest_name(name):
    config = composed("method=sparsegpt")
    known = next(iter(config[name]))
    config[name][f"{known}s"] = 1
    with pytest.raises(SettingsError, match=rf"{name}\.{known}s: no such setting, got 1.*{known}"):
        read_settings(config)


def outside() -> list[tuple[str, str, float]]:
    """Return a value outside each bound of each engine option."""
    found = []
    for group, options in OPTION_CLASSES.items():
        for name, field in fields_of(options).items():
            for bound in bounds_of(field):
                found.append((group, name, beyond(bound)))
            if bounds_of(field):
                found.append((group, name, math.nan))
    return found


def bounds_of(field: Any) -> list[Any]:
    inner = [bound for kind in getattr(field.annotation, "__args__", ()) for bound in getattr(kind, "__metadata__", ())]
    return [bound for bound in [*field.metadata, *inner] if isinstance(bound, (Ge, Gt, Le, Lt))]


def beyond(bound: Any) -> float:
    match bound:
        case Ge(ge=limit):
            return limit - 1
        case Gt(gt=limit):
            return limit
        case Le(le=limit):
            return limit + 1
        case Lt(lt=limit):
            return limit
    raise TypeError(bound)


def test_options_have_bounds():
    assert len(outside()) > 30


@pytest.mark.parametrize(("group", "name", "value"), outside())
def test_engine_and_settings_reject_the_same_values(group, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}"):
        OPTION_CLASSES[group](**{name: value})
    config = composed("method=sparsegpt")
    config[group][name] = value
    with pytest.raises(SettingsError, match=rf"{group}\.{name}: expected .*, got {value}"):
        read_settings(config)


@pytest.mark.parametrize("name", OPTION_CLASSES)
def test_new_engine_options_have_an_effect_without_an_entry(name):
    assert effect_of(f"{name}.new_option") is effect_of(name)
    assert effect_of(name).modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("method.options.max_cycles=2.5", "method.options.max_cycles: expected a valid integer"),
        ("method.options.max_cycles=many", "method.options.max_cycles: expected a valid integer"),
        ("method.options.max_cycles=-1", "method.options.max_cycles: expected at least 0, got -1"),
        ("method.options.same_sign=perhaps", "method.options.same_sign: expected a valid boolean"),
        ("method.options.initial=random", "method.options.initial: expected 'wanda', 'magnitude' or 'sparsegpt', got 'random'"),
        ("method.options.cycles=3", "method.options.cycles: expected one of initial, max_cycles"),
    ],
)
def test_options_of_methods_are_checked_like_settings(options, message):
    with pytest.raises(SettingsError, match=message):
        read_settings(composed("method=dsnot", f"++{options}"))


def test_options_of_methods_are_converted_like_settings():
    settings = read_settings(composed("method=dsnot", "method.options.max_cycles='7'", "method.options.same_sign='false'"))
    method = settings.method.create()
    assert (method.max_cycles, method.same_sign) == (7, False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"block_size": 2.5}, "block_size: expected an integer, got 2.5"),
        ({"block_size": True}, "block_size: expected an integer, got True"),
        ({"damping": "0.1"}, "damping: expected a number, got '0.1'"),
        ({"backend": "cuda"}, "backend: expected one of auto, torch, numba, triton, got 'cuda'"),
    ],
)
def test_the_engine_checks_types(options, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        EngineOptions(**options)
