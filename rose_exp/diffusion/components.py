"""Load the models of a diffusion pipeline one by one, and reject incomplete weights."""

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
    """Load every model of the pipeline in ``folder``.

    diffusers and transformers initialize missing tensors at random and drop unexpected ones. Each model is loaded separately,
    because only then do the libraries report both.

    Args:
        denoiser: names that pipelines give to their denoiser. Unexpected tensors are an error there and allowed elsewhere.
        options: arguments of ``from_pretrained``.
    Returns:
        The models by their name in the pipeline, and the names of unexpected tensors outside the denoiser.
    Raises:
        RoseExpError: a tensor is missing, has an unexpected shape or is not finite, or an index refers to a file outside its
            folder.
    """
    components: dict[str, Any] = {}
    unused: list[str] = []
    for name, kind in _listed(folder).items():
        if not issubclass(kind, nn.Module):
            continue
        _check_index(folder / name)
        model, info = kind.from_pretrained(folder, subfolder=name, output_loading_info=True, **options)
        extra = sorted(info.get("unexpected_keys", ()))
        problems = [f"{key} is missing" for key in sorted(info.get("missing_keys", ()))]
        problems += [f"the shape of {key} differs" for key, *_ in map(_entry, info.get("mismatched_keys", ()))]
        problems += [str(message) for message in info.get("error_msgs", ())]
        problems += [f"{key} is unexpected" for key in extra if name in denoiser]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise RoseExpError(
                f"model.path: the weights of {folder / name} do not match its configuration: {'; '.join(problems[:3])}{more}"
            )
        unused += [f"{name}: {key}" for key in extra]
        own_weights(model, f"model.path: {folder / name}")
        components[name] = model
    return components, unused


def _listed(folder: Path) -> dict[str, type]:
    """Return the class of each component that ``model_index.json`` lists."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        listed = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and all(entry)}
    except (OSError, ValueError, AttributeError) as error:
        reason = f"no readable model_index.json: {error}"
        raise RoseExpError(f"model.path: cannot load the pipeline {str(folder)!r}: {reason}") from error
    classes = {}
    for name, (library, kind) in listed.items():
        try:
            classes[name] = getattr(importlib.import_module(library), kind)
        except (ImportError, AttributeError) as error:
            raise RoseExpError(f"model.path: {folder} uses {library}.{kind} as its {name}, which is not installed") from error
        if not (folder / name).is_dir():
            raise RoseExpError(f"model.path: expected a folder {name} in {folder}, as listed in model_index.json, got none")
    return classes


def _check_index(folder: Path) -> None:
    for path in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RoseExpError(f"model.path: expected an index of shards in {path}, got {error!r}") from error
        for shard in shards:
            if Path(shard).name != shard:
                raise RoseExpError(f"model.path: expected names of files in the folder of {path}, got {shard!r}")


def _entry(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
