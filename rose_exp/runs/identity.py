"""Run IDs: hashes of all settings that can change a result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..runtime.errors import RoseExpError
from ..runtime.fingerprint import content_sha256, folder_sha256, model_sha256
from ..runtime.wheels import WHEELS
from ..settings.diffusion import PIPELINES, embedded_folder
from ..settings.effective import Setting, settings_of
from ..settings.plugins import used_plugins
from ..settings.pruning import DENSE
from ..settings.schema import Settings, read_settings
from ..settings.texts import PROMPTS, TextSettings, prompts_file, text_format

LENGTH = 12  # hexadecimal digits: the chance of a collision among a million runs is 1 in 500
UNKNOWN = "unknown"


def run_id(settings: Settings) -> str:
    """Return twelve hexadecimal digits, which are equal for settings that lead to equal results.

    The ID depends on the resolved settings, so changing a default in a configuration file changes it.
    """
    text = json.dumps(identifying(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def identifying(settings: Settings) -> dict[str, Any]:
    """Return the settings that can change the result, by dotted name, with the contents of files in place of their paths.

    :mod:`rose_exp.settings.effects` decides which settings these are.

    Raises:
        RoseExpError: a file is unreadable.
    """
    values = _values(settings.model_dump(mode="json"))
    used = plugins_of(settings)
    return values | ({"plugins": used} if used else {})


def identifying_dense(settings: Settings, metric: str) -> dict[str, Any]:
    """Return the settings that can change a metric of the dense model, as :func:`identifying` does."""
    config = settings.model_dump(mode="json")
    return _values(config | {"method": config["method"] | {"name": DENSE}}, metric)


def _values(config: dict[str, Any], metric: str | None = None) -> dict[str, Any]:
    return {setting.name: _contents(setting) for setting in settings_of(config, metric)}


def plugins_of(settings: Settings) -> dict[str, Any]:
    """Return the sources and fingerprints of the parts of other packages that a run uses."""
    images = settings.evaluation.images if settings.model.kind == "diffusion" else None
    texts: list[TextSettings] = [*settings.evaluation.perplexity.values(), *([images] if images is not None else [])]
    if not settings.pruned:
        return used_plugins("", "", _datasets(texts))
    score = settings.reorder.score if settings.reorder else ""
    return used_plugins(settings.method.name, score, _datasets([settings.calibration, *texts]))


def _datasets(texts: Iterable[TextSettings]) -> set[str]:
    """Return the data sets of other packages that supply texts."""
    return {text.used_plugin for text in texts if text.used_plugin is not None}


def _contents(setting: Setting) -> Any:
    """Return the fingerprint of the file or model that a setting names, or its value if it names none."""
    kind, value = setting.effect.place, setting.value
    if kind is None or value is None:
        return value
    if kind == "embedded":
        return _embedded_sha256(value)
    place = Path(os.path.expanduser(value))
    fingerprint = model_sha256 if kind == "model" else folder_sha256
    try:
        content = fingerprint(place) if os.path.exists(place) else value
    except RoseExpError as error:
        raise RoseExpError(f"{setting.name}: {error}") from error
    return f"{content} {text_format(value)}" if kind == "text" else content  # the format decides how a file is read


def _embedded_sha256(name: str) -> str:
    if name in PROMPTS:
        return content_sha256(prompts_file(name))
    return folder_sha256(embedded_folder(name)) if name in PIPELINES else WHEELS[name].sha256


def _resolved_run_id(*, _root_: DictConfig) -> str:
    plain = OmegaConf.create({name: _root_._get_node(name) for name in _root_ if name != "hydra"})
    try:
        return run_id(read_settings(OmegaConf.to_container(plain, resolve=True)))
    except RoseExpError:
        return UNKNOWN  # the configuration is only shown, not run


def register_resolver() -> None:
    """Register ``${run_id:}``. Reading the settings registers the other resolvers of the configuration files."""
    OmegaConf.register_new_resolver("run_id", _resolved_run_id, replace=True)
