"""Reading the models of a diffusion pipeline one by one, each completely or not at all."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..models import own_weights
from ..runtime.errors import RoseExpError


def read_components(folder: Path, denoiser: tuple[str, ...], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Every model of the pipeline in ``folder``, by its name in the pipeline.

    diffusers and transformers initialize what a checkpoint lacks at random, and drop what they have no place for. Here, each
    model is loaded by itself, for its account of both.

    Args:
        denoiser: what pipelines call their denoiser, in which everything has to have a place.
        options: of ``from_pretrained``.
    Returns:
        The models, and names of tensors outside the denoiser that have no place in their model.
    Raises:
        RoseExpError: a tensor is missing, has another shape or is not finite, or an index points out of its folder.
    """
    components: dict[str, Any] = {}
    unused: list[str] = []
    for name, kind in _listed(folder).items():
        if not issubclass(kind, nn.Module):
            continue
        _check_index(folder / name)
        model, info = kind.from_pretrained(folder, subfolder=name, output_loading_info=True, **options)
        extra = sorted(info.get("unexpected_keys", ()))
        problems = [f"it has no {key}" for key in sorted(info.get("missing_keys", ()))]
        problems += [f"expected {key} of another shape" for key, *_ in map(_entry, info.get("mismatched_keys", ()))]
        problems += [str(message) for message in info.get("error_msgs", ())]
        problems += [f"its configuration has no place for {key}" for key in extra if name in denoiser]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise RoseExpError(
                f"model.path: the weights of {folder / name} do not fit its configuration: {'; '.join(problems[:3])}{more}"
            )
        unused += [f"{name}: {key}" for key in extra]
        own_weights(model, f"model.path: {folder / name}")
        components[name] = model
    return components, unused


def _listed(folder: Path) -> dict[str, type]:
    """The class of every part that ``model_index.json`` lists."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        listed = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and all(entry)}
    except (OSError, ValueError, AttributeError) as error:
        reason = f"no readable model_index.json: {error}"
        raise RoseExpError(f"model.path: cannot load the pipeline {str(folder)!r}: {reason}") from error
    found = {}
    for name, (library, kind) in listed.items():
        try:
            found[name] = getattr(importlib.import_module(library), kind)
        except (ImportError, AttributeError) as error:
            raise RoseExpError(f"model.path: {folder} names {library}.{kind} as its {name}, which is not installed") from error
        if not (folder / name).is_dir():
            raise RoseExpError(f"model.path: expected a folder {name} in {folder}, as model_index.json says, got none")
    return found


def _check_index(folder: Path) -> None:
    for path in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RoseExpError(f"model.path: {path} is no index of shards: {error!r}") from error
        for shard in shards:
            if Path(shard).name != shard:
                raise RoseExpError(f"model.path: expected names of files beside {path}, got {shard!r}, which leads elsewhere")


def _entry(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
