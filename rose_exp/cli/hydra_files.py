"""Redaction of secrets in what Hydra writes and prints: ``.hydra/*.yaml``, ``multirun.yaml`` and ``--cfg``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hydra._internal.core_plugins.basic_sweeper
import hydra._internal.hydra
import hydra.core.utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ..runtime.redaction import redact, redacted

NAMES = ("project", "entity", "group", "name", "job_type")  # of runs in W&B
WRITERS = (hydra.core.utils, hydra._internal.hydra, hydra._internal.core_plugins.basic_sweeper)
LABELS = ("tags", *(f"tracking.wandb.{name}" for name in NAMES), "tracking.accelerate.project")
"""Settings that only name a run. No part of a run reads a secret in them."""


class RedactingOmegaConf(OmegaConf):
    """OmegaConf with YAML without secrets."""

    @staticmethod
    def to_yaml(cfg: Any, *, resolve: bool = False, sort_keys: bool = False) -> str:
        return OmegaConf.to_yaml(_without_secrets(cfg, resolve), sort_keys=sort_keys)

    @staticmethod
    def save(config: Any, f: Any, resolve: bool = False) -> None:
        OmegaConf.save(_without_secrets(config, resolve), f)


def _without_secrets(config: Any, resolve: bool) -> Any:
    return OmegaConf.create(redact(OmegaConf.to_container(config, resolve=resolve, enum_to_str=True)))


def redact_hydra() -> None:
    """Make Hydra write configurations without secrets, in this process."""
    for module in WRITERS:
        module.OmegaConf = RedactingOmegaConf


def without_secrets(arguments: list[str]) -> list[str]:
    """Return a command line without secrets in the names and tags of runs, which launchers and trackers store."""
    parser = OverridesParser.create()
    return [_label_without_secrets(parser, text) for text in arguments]


def stored_secrets(launcher: str, arguments: Sequence[str]) -> list[str]:
    """Return an error for each secret in a command line that the launcher would store in a file, for the workers to read.

    Args:
        launcher: the name of the launcher's class.
    """
    if "submitit" not in launcher:
        return []
    return [
        f"{text.partition('=')[0]}: expected no secret on the command line with a launcher of submitit, which stores it in a "
        "file, got one; set an environment variable before the command instead"
        for text in arguments
        if redact([text]) != [text]
    ]


def _label_without_secrets(parser: OverridesParser, text: str) -> str:
    if redacted(text) == text:
        return text
    try:
        name = parser.parse_override(text).key_or_group
    except HydraException:
        return text  # an option, or an error that the check of the command reports
    return redacted(text) if name in LABELS else text
