"""Load the models of a diffusion pipeline one by one, and reject incomplete weights."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import pipelines
from torch import nn

from ..models import own_weights
from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors, read_json_object
from . import modeling_narrowed

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers", modeling_narrowed.MODULE)  # whose classes pipelines may use
NULLABLE = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")  # components that may be null


def read_components(
    folder: Path, denoiser: tuple[str, ...], omitted: Sequence[str], options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Load every model of the pipeline in ``folder``.

    diffusers and transformers initialize missing tensors at random and drop unexpected ones. Each model is loaded separately,
    because only then do the libraries report both.

    Args:
        denoiser: names that pipelines give to their denoiser. Unexpected tensors are an error there and allowed elsewhere.
        omitted: names of components to leave out.
        options: arguments of ``from_pretrained``.
    Returns:
        The models by their name in the pipeline, None for components that are left out, and the names of unexpected tensors
        outside the denoiser.
    Raises:
        RoseExpError: a component or tensor is missing, has an unexpected shape or is not finite, or an index refers to a file
            outside its folder.
    """
    index = read_index(folder)
    unused: list[str] = []
    components: dict[str, Any] = {name: None for name, entry in index.items() if entry is None}
    for name in omitted:
        if name not in index:
            raise RoseExpError(f"model.omit: expected components of the pipeline in {folder}, got {name}")
        components |= dict.fromkeys(with_tokenizer(name))
    for name, entry in index.items():
        if name in components:
            continue
        kind = _class_of(folder, name, entry)
        if issubclass(kind, nn.Module):
            components[name] = _read_model(folder / name, kind, name in denoiser, options, unused)
    return components, unused


def with_tokenizer(name: str) -> tuple[str, str]:
    """Return the names of a text encoder and its tokenizer."""
    return name, name.replace("text_encoder", "tokenizer")


def read_index(folder: Path) -> dict[str, tuple[str, str] | None]:
    """Return library and class of each component that ``model_index.json`` lists; None for those that the pipeline lacks.

    Raises:
        RoseExpError: the file is missing or damaged.
    """
    path = folder / INDEX
    index: dict[str, tuple[str, str] | None] = {}
    for name, entry in read_json_object(path, "model.path").items():
        if entry == [None, None] or (entry is None and name.startswith(NULLABLE)):
            index[name] = None
        elif isinstance(entry, list):
            if len(entry) != 2 or not all(isinstance(part, str) and part for part in entry) or Path(name).name != name:
                raise RoseExpError(f"model.path: expected a library and a class for {name} in {path}, got {entry!r}")
            index[name] = tuple(entry)
    return index


def _class_of(folder: Path, name: str, entry: tuple[str, str]) -> type:
    library, kind = entry
    if library.partition(".")[0] not in LIBRARIES and not hasattr(pipelines, library):
        expected = f"one of {', '.join(LIBRARIES)}"
        raise RoseExpError(f"model.path: expected {expected} as the library of {name} in {folder}, got {library!r}")
    with outside_errors(f"model.path: {folder} uses {library}.{kind} as its {name}, which is not installed"):
        # of narrowed models, the class of this package, and not the code in their folder
        own = modeling_narrowed if library == modeling_narrowed.MODULE else None
        module = own or getattr(pipelines, library, None) or importlib.import_module(library)
        found = getattr(module, kind)
    if not isinstance(found, type):
        raise RoseExpError(f"model.path: expected a class for the {name} of {folder}, got {library}.{kind}")
    if not (folder / name).is_dir():
        raise RoseExpError(f"model.path: expected a folder {name} in {folder}, as listed in {INDEX}, got none")
    return found


def _read_model(folder: Path, kind: Any, strict: bool, options: Mapping[str, Any], unused: list[str]) -> nn.Module:
    """Load a model, and add its unexpected tensors to ``unused``.

    Args:
        strict: whether unexpected tensors are an error.
    """
    read_json_object(folder / "config.json", "model.path")
    _check_index(folder)
    with outside_errors(f"model.path: cannot load {folder}{_variants(folder, options.get('variant'))}"):
        model, info = kind.from_pretrained(folder.parent, subfolder=folder.name, output_loading_info=True, **options)
    extra = sorted(info.get("unexpected_keys", ()))
    problems = [f"{key} is missing" for key in sorted(info.get("missing_keys", ()))]
    problems += [f"the shape of {key} differs" for key, *_ in map(_entry, info.get("mismatched_keys", ()))]
    problems += [str(message) for message in info.get("error_msgs", ())]
    problems += [f"{key} is unexpected" for key in extra if strict]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise RoseExpError(
            f"model.path: the weights of {folder} do not match its configuration: {'; '.join(problems[:3])}{more}"
        )
    unused += [f"{folder.name}: {key}" for key in extra]
    own_weights(model, f"model.path: {folder}")
    return model


def _variants(folder: Path, wanted: str | None) -> str:
    """Return a note on the variants of weight files in a folder, if the wanted one is not among them."""
    names = {path.name.removesuffix(".safetensors") for path in folder.glob("*.safetensors")}
    names = {re.sub(r"-\d+-of-\d+$", "", name) for name in names}
    found = {name.partition(".")[2] or None for name in names}
    if wanted in found or not found:
        return ""
    return f" with model.variant={wanted or 'null'}, expected one of {', '.join(sorted(name or 'null' for name in found))}"


def _check_index(folder: Path) -> None:
    for path in folder.glob("*.index*.json"):
        weight_map = read_json_object(path, "model.path").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise RoseExpError(f"model.path: expected an index of shards in {path}, got no names of files in weight_map")
        for shard in set(weight_map.values()):
            if Path(shard).name != shard:
                raise RoseExpError(f"model.path: expected names of files in the folder of {path}, got {shard!r}")


def _entry(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
