"""Cases for the table of effects: an alternative value of each setting, and the view that a report has of a run."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rose_exp.cli.paths import config_folder
from rose_exp.report.conditions import SPARSITY, column_of, conditions, variant
from rose_exp.report.gather import repeat_of
from rose_exp.settings.schema import Settings
from rose_exp.settings.section import fields_of, is_section

from .effects_modes import ALTERNATIVES, LANGUAGE, MODES


def leaves(section: type = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and fields of all settings; ``*`` stands for user-defined names of texts."""
    for name, field in fields_of(section).items():
        kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
        inner = [kind for kind in kinds if is_section(kind)]
        if not inner:
            yield prefix + name, field
        else:
            many = get_origin(field.annotation) is dict
            yield from leaves(inner[0], f"{prefix}{name}.{'*.' if many else ''}")


LEAVES = dict(leaves())


def changed(config: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(config)
    *path, last = name.split(".")
    place = found
    for part in path:
        place = place[part]
    place[last] = value
    return found


def at(config: Any, name: str) -> Any:
    """Return the value of a setting; raise LookupError if the configuration has no such section."""
    for part in name.split("."):
        if not isinstance(config, dict) or part not in config:
            raise LookupError(name)
        config = config[part]
    return config


def another(name: str, field: Any, value: Any) -> Any:
    """Return a valid value of a leaf that differs from ``value``."""
    if name in ALTERNATIVES:
        return next(other for other in ALTERNATIVES[name] if other != value)
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return next(choice for choice in get_args(field.annotation) if choice != value)
    for kind in kinds:
        if get_origin(kind) is Literal and value not in (None, "auto"):
            return next(choice for choice in get_args(kind) if choice != value)
    kinds = [get_args(kind)[0] if get_origin(kind) is not None and get_origin(kind) is not Literal else kind for kind in kinds]
    if bool in kinds:
        return not value
    if int in kinds:
        step = 8 if "height" in name or "width" in name else 1
        return value + step if isinstance(value, int) else 64
    if float in kinds:
        return 0.25 if value is None else value + 0.0625 if value < 0.9 else value + 0.25
    literals = [get_args(kind) for kind in kinds if get_origin(kind) is Literal]
    if literals:
        return next(choice for choice in literals[0] if choice != value)
    raise AssertionError(f"{name}: no other value is known; add one to ALTERNATIVES")


def bases_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return a complete configuration of each mode and write the files that it names to ``folder``."""
    for name in ("one", "two", "model"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'{{"name": "{name}"}}')
    for name in ("a.jsonl", "b.jsonl", "a.txt"):
        (folder / name).write_text(f'{{"text": "{name}"}}')
    texts = [f"calibration.path={folder}/a.jsonl", f"evaluation.perplexity.local.path={folder}/a.jsonl"]
    language = ["model=local", f"model.path={folder}/model", "calibration=local", "evaluation=[local,zero_shot]", *texts]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        composed = [compose("config", overrides=[*own, "method=sparsegpt"]) for own in (language, ["model=small-sd3"])]
    first, second = (Settings(**OmegaConf.to_container(c, resolve=True)).model_dump(mode="json") for c in composed)
    found = {}
    for name, changes in MODES.items():
        config = first if name in LANGUAGE else second
        for setting, value in changes.items():
            config = changed(config, setting, value)
        found[name] = Settings(**located(config, folder)).model_dump(mode="json")
    return found


def located(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the configuration with the names of the test files replaced by their paths."""
    for name in ("model.path", "calibration.path", "evaluation.perplexity.local.path", "evaluation.images.path"):
        config = _located(config, name, folder)
    for name in ("zero_shot.include_path", "zero_shot.data_dir", "images.clip", "images.reference"):
        config = _located(config, f"evaluation.{name}", folder)
    return config


def _located(config: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    try:
        value = at(config, name)
    except LookupError:
        return config
    return changed(config, name, str(folder / value)) if value is not None and (folder / value).exists() else config


def content(path: str) -> str:
    """Return the content of the files at a path, or the path if it does not exist."""
    place = Path(path)
    if not path or not place.exists():
        return path
    return "".join(file.read_text() for file in (sorted(place.rglob("*")) if place.is_dir() else [place]))


def text_of(source: dict[str, Any], prompts: bool) -> str:
    """Return the fingerprint that a run records for the documents or prompts of a text."""
    rows = (source["field"], source["rows"])
    if source["path"] is not None:
        plain = source["path"].endswith(".txt")
        facts: Any = (content(source["path"]), ("", source["rows"] if prompts else None) if plain else rows)
    elif source["embedded"] is not None:
        facts = (source["embedded"], source["rows"] if prompts else None)
    elif source["plugin"] is not None:
        facts = (source["plugin"], source["rows"])
    else:
        facts = ([source[name] for name in ("dataset", "subset", "data_files", "revision", "split")], rows)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def recorded(config: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a run record that reports read; its protocol describes the content of the files."""
    diffusion, pruned = config["model"]["kind"] == "diffusion", config["method"]["name"] != "dense"
    model, evaluation, calibration = config["model"], config["evaluation"], config["calibration"]
    source = (model["built"] if diffusion else None) or model["path"] or model["embedded"] or ""
    local = source == model["embedded"] or Path(source).exists()
    prints = {"sha256": content(source)} if local else {}
    protocol: dict[str, Any] = {"seed": config["seed"], "model": {"name": "m", "source": source, **prints}}
    protocol["backend"] = config["engine"]["backend"] if pruned else None
    protocol["calibration"] = {"source": "x", "sha256": text_of(calibration, diffusion)} if pruned else None
    protocol["evaluation"] = {
        name: {"source": "x", "sha256": text_of(text, False)} for name, text in evaluation["perplexity"].items()
    }
    tasks = evaluation["zero_shot"]["tasks"]
    if tasks and not diffusion:
        folder, include = evaluation["zero_shot"]["data_dir"], evaluation["zero_shot"]["include_path"]
        rows = {"sha256": content(folder), "source": folder} if folder else {"source": evaluation["zero_shot"]["data"]}
        protocol["zero_shot"] = {"data": {"piqa": rows}, "results": str(config["tags"])}
        protocol["zero_shot"] |= {"include_sha256": content(include)} if include else {}
    images = evaluation["images"]
    if images is not None and diffusion:
        protocol["images"] = {"source": "x", "sha256": text_of(images, True), "clip": None, "reference": None}
        protocol["images"] |= {"clip": content(images["clip"])} if "clip_score" in images["metrics"] else {}
        protocol["images"] |= {"reference": content(images["reference"] or "")} if "fid" in images["metrics"] else {}
    return {"config": config, "protocol": protocol}


def metrics_of(config: dict[str, Any]) -> list[str]:
    """Return the metrics that a run with this configuration measures."""
    pruned, evaluation = config["method"]["name"] != "dense", config["evaluation"]
    found = ["sparsity", *(["minutes.pruning"] if pruned else [])]
    if config["model"]["kind"] == "diffusion":
        return found + [f"images.{name}" for name in (evaluation["images"] or {"metrics": []})["metrics"]]
    kinds = ["perplexity", *(["kl_divergence", "top1_agreement"] if evaluation["divergence"] and pruned else [])]
    found += [f"{kind}.{name}" for kind in kinds for name in evaluation["perplexity"]]
    found += [f"zero_shot.{task}" for task in evaluation["zero_shot"]["tasks"]]
    timed = evaluation["speed"] and pruned and config["sparsity"]["pattern"] == "2:4"
    return found + (["speed.dense_seconds"] if timed else [])


def view(config: dict[str, Any]) -> dict[str, Any]:
    """Return all that distinguishes runs in a report: conditions of each metric including sparsity, row, column and repeat."""
    record, pruned = recorded(config), config["method"]["name"] != "dense"
    found: dict[str, Any] = {metric: conditions(record, metric, "seed") for metric in metrics_of(config)}
    found |= {"row": variant(record), "column": column_of(record, SPARSITY) if pruned else None}
    return found | {"repeat": repeat_of(record) if pruned else None}


def cases(config: dict[str, Any], folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield for each leaf its name, its name in ``MATTERS``, and the configuration with another valid value."""
    for known, field in LEAVES.items():
        name = known.replace("*", "local")
        try:
            value = at(config, name)
        except LookupError:  # the configuration lacks the section
            continue
        if known == "model.path" and value is None and config["model"]["kind"] == "language":
            yield name, known, located(changed(config, name, "two"), folder)
            continue
        other = located(changed(config, name, another(known, field, _short(value, folder))), folder)
        Settings.model_validate(other)
        assert Settings.model_validate(other) != Settings.model_validate(config), name
        yield name, known, other


def _short(value: Any, folder: Path) -> Any:
    return value.removeprefix(f"{folder}/") if isinstance(value, str) else value


def moved(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Copy all files that the configuration names to ``folder`` and return it with the new paths."""
    for known in LEAVES:
        name = known.replace("*", "local")
        try:
            place = Path(at(config, name))
        except (LookupError, TypeError):
            continue
        if place.is_absolute() and place.exists():
            other = folder / f"{name}-{place.name}"
            shutil.copytree(place, other) if place.is_dir() else shutil.copy(place, other)
            config = changed(config, name, str(other))
    return config
