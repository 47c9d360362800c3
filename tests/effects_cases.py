"""Cases for the table of effects: modes of a run, another value of each setting, and what a report sees of a run."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rose_exp.entry import config_folder
from rose_exp.report.conditions import SPARSITY, column_of, conditions, variant
from rose_exp.section import Section
from rose_exp.settings import Settings

SPEED = {"windows": 1, "window": 64, "repeats": 3}
HUB_TEXT = {"path": None, "embedded": None, "dataset": "a/b", "subset": "s", "data_files": "f", "revision": "r", "split": "t"}
HUB = {"model.path": "owner/name"} | {f"evaluation.perplexity.local.{name}": value for name, value in HUB_TEXT.items()}

# Modes of a run, as changes to a pruned language model with a local model and JSON texts, or to a pruned diffusion model.
EMBEDDED_MODEL = {"model.path": None, "model.embedded": "smollm2-135m"}
EMBEDDED_TEXT = {"evaluation.perplexity.local.path": None, "evaluation.perplexity.local.embedded": "wiki"}
LANGUAGE: dict[str, dict[str, Any]] = {
    "unstructured": {},
    "ordered": {"reorder.columns": "descending"},
    "n:m": {"sparsity.pattern": "2:4", "sparsity.ratio": None, "evaluation.speed": SPEED},
    "4:8": {"sparsity.pattern": "4:8", "sparsity.ratio": None, "evaluation.speed": SPEED},
    "structured": {"sparsity.pattern": "structured"},
    "heads": {"sparsity.pattern": "structured", "sparsity.neurons": False},
    "neurons": {"sparsity.pattern": "structured", "sparsity.heads": False},
    "structured wanda": {"sparsity.pattern": "structured", "method.name": "wanda"},
    "wanda": {"method.name": "wanda"},
    "owl": {"allocation.rule": "owl"},
    "losses": {"allocation.rule": "losses"},
    "least squares": {"refine.steps": 8},
    "masks": {"refine.mask_iterations": 12},
    "target": {"target.strength": 0.5},
    "residual": {"target.residual": 0.5},
    "embedded": EMBEDDED_MODEL | EMBEDDED_TEXT | {"calibration.path": None, "calibration.embedded": "c4"},
    "hub": HUB | {f"calibration.{name}": value for name, value in HUB_TEXT.items()},
    "plain texts": {"calibration.path": "a.txt", "evaluation.perplexity.local.path": "a.txt"},
    "tasks from a folder": {"evaluation.zero_shot.data_dir": "one"},
    "no tasks": {"evaluation.zero_shot.tasks": []},
    "nothing measured": {"evaluation.perplexity": {}, "evaluation.zero_shot.tasks": []},
    "dense": {"method.name": "dense", "evaluation.speed": SPEED, "sparsity.pattern": "2:4"},
    "dense embedded": EMBEDDED_MODEL | EMBEDDED_TEXT | {"method.name": "dense"},
    "dense hub": HUB | {"method.name": "dense"},
    "dense structured": {"method.name": "dense", "sparsity.pattern": "structured", "refine.steps": 8, "target.strength": 0.5},
}
DIFFUSION: dict[str, dict[str, Any]] = {
    "images": {},
    "images structured": {"sparsity.pattern": "structured"},
    "images ordered": {"reorder.columns": "descending"},
    "images uniform": {"diffusion.weighting": "uniform"},
    "images scored": {"evaluation.images.metrics": ["clip_score", "fid"]},
    "images of prompts": {"calibration.path": "a.txt", "evaluation.images.path": "a.txt"},
    "images of rows": {"calibration.path": "a.jsonl", "evaluation.images.path": "a.jsonl"},
    "images of hub": {"model.built": None, "model.path": "owner/name"},
    "no images": {"evaluation.images": None},
    "dense images": {"method.name": "dense"},
    "dense images scored": {"method.name": "dense", "evaluation.images.metrics": ["clip_score", "fid"]},
    "dense images of rows": {"method.name": "dense", "evaluation.images.path": "a.jsonl"},
    "dense images of hub": {"method.name": "dense", "model.built": None, "model.path": "owner/name"},
    "dense no images": {"method.name": "dense", "evaluation.images": None},
}
MODES = LANGUAGE | DIFFUSION
DENSE = {name for name, changes in MODES.items() if changes.get("method.name") == "dense"}
PRUNED = set(MODES) - DENSE
PRUNED_LANGUAGE, PRUNED_DIFFUSION = PRUNED & set(LANGUAGE), PRUNED & set(DIFFUSION)
STRUCTURED = {"structured", "heads", "neurons", "structured wanda", "images structured"}
JSON_TEXTS = set(LANGUAGE) - {"embedded", "dense embedded", "plain texts"}
MEASURED = set(LANGUAGE) - {"nothing measured"}
TASKS = MEASURED - {"no tasks"}
IMAGES = set(DIFFUSION) - {"no images", "dense no images"}
SAMPLED = set(DIFFUSION) - {"dense no images"}
NOWHERE: set[str] = set()

# The modes in which each leaf can change a result. It is written out here, not read from the table that it tests.
MATTERS: dict[str, set[str]] = {
    "model.kind": set(MODES),
    "model.embedded": {"embedded", "dense embedded"},
    "model.built": set(DIFFUSION),
    "model.path": set(MODES),
    "model.revision": {"hub", "dense hub", "images of hub", "dense images of hub"},
    "model.dtype": set(MODES),
    "model.blocks": set(LANGUAGE),
    "model.bos": set(LANGUAGE),
    "model.trust_remote_code": set(LANGUAGE) - {"embedded", "dense embedded"},
    "sparsity.pattern": PRUNED,
    "sparsity.ratio": PRUNED - {"n:m", "4:8"},
    "sparsity.heads": STRUCTURED,
    "sparsity.neurons": STRUCTURED,
    "sparsity.saliency": {"structured", "heads", "images structured"},
    "sparsity.at_once": {"structured", "neurons", "images structured"},
    "allocation.rule": PRUNED_LANGUAGE,
    "allocation.spread": {"owl", "losses"},
    "allocation.outlier": {"owl"},
    "method.name": set(MODES),
    "method.options": PRUNED,
    "method.layer_options": PRUNED,
    "reorder.columns": PRUNED,
    "reorder.blocks": PRUNED,
    "reorder.threshold": {"ordered", "images ordered"},
    "reorder.score": {"ordered", "images ordered"},
    "calibration.path": PRUNED,
    "calibration.embedded": {"embedded", "hub", *PRUNED_DIFFUSION} - {"images of prompts", "images of rows"},
    "calibration.field": (PRUNED & JSON_TEXTS) | {"images of rows"},
    "calibration.rows": (PRUNED & JSON_TEXTS) | PRUNED_DIFFUSION,
    "calibration.separator": PRUNED_LANGUAGE,
    "calibration.samples": PRUNED,
    "calibration.window": PRUNED_LANGUAGE,
    "calibration.draw": PRUNED,
    "evaluation.perplexity.*.path": MEASURED,
    "evaluation.perplexity.*.embedded": {"embedded", "dense embedded", "hub", "dense hub"},
    "evaluation.perplexity.*.field": MEASURED & JSON_TEXTS,
    "evaluation.perplexity.*.rows": MEASURED & JSON_TEXTS,
    "evaluation.perplexity.*.separator": MEASURED,
    "evaluation.perplexity.*.window": MEASURED,
    "evaluation.perplexity.*.windows": MEASURED,
    "evaluation.zero_shot.tasks": set(LANGUAGE),
    "evaluation.zero_shot.few_shot": TASKS,
    "evaluation.zero_shot.limit": TASKS,
    "evaluation.zero_shot.batch": TASKS,
    "evaluation.zero_shot.include_path": TASKS,
    "evaluation.zero_shot.data": TASKS - {"tasks from a folder"},
    "evaluation.zero_shot.data_dir": TASKS,
    "evaluation.speed.windows": {"n:m"},
    "evaluation.speed.window": {"n:m"},
    "evaluation.speed.repeats": {"n:m"},
    "evaluation.images.path": IMAGES,
    "evaluation.images.embedded": IMAGES - {"images of prompts", "images of rows", "dense images of rows"},
    "evaluation.images.field": {"images of rows", "dense images of rows"},
    "evaluation.images.rows": IMAGES,
    "evaluation.images.separator": NOWHERE,
    "evaluation.images.samples": IMAGES,
    "evaluation.images.metrics": IMAGES,
    "evaluation.images.clip": {"images scored", "dense images scored"},
    "evaluation.images.reference": {"images scored", "dense images scored"},
    "evaluation.images.sheet": NOWHERE,
    "evaluation.batch": MEASURED,
    "evaluation.at_most": MEASURED | IMAGES,
    "engine.block_size": PRUNED,
    "engine.damping": PRUNED,
    "engine.backend": PRUNED,
    "engine.precision": PRUNED,
    "engine.permute": {"n:m", "4:8"},
    "refine.steps": PRUNED,
    "refine.tolerance": {"least squares"},
    "refine.damping": {"least squares", "masks"},
    "refine.mask_iterations": PRUNED,
    "refine.penalty": {"masks"},
    "refine.growth": {"masks"},
    "refine.every": {"masks"},
    "refine.relaxation": {"masks"},
    "target.strength": PRUNED_LANGUAGE,
    "target.residual": PRUNED_LANGUAGE,
    "target.damping": {"target", "residual"},
    "pipeline.layers": set(MODES),
    "pipeline.skip": set(MODES),
    "pipeline.true_sequential": PRUNED_LANGUAGE,
    "pipeline.batch": PRUNED_LANGUAGE,
    "pipeline.expert_tokens": PRUNED_LANGUAGE,
    "pipeline.starved_experts": PRUNED_LANGUAGE,
    "diffusion.packages": PRUNED_DIFFUSION,
    "diffusion.weighting": PRUNED_DIFFUSION,
    "diffusion.alpha_min": PRUNED_DIFFUSION - {"images uniform"},
    "diffusion.alpha_max": PRUNED_DIFFUSION - {"images uniform"},
    "diffusion.convolutions": set(DIFFUSION),
    "seed": PRUNED,
}
for _name in ("dataset", "subset", "data_files", "revision", "split"):
    MATTERS |= {f"calibration.{_name}": {"hub"}, f"evaluation.perplexity.*.{_name}": {"hub", "dense hub"}}
    MATTERS |= {f"evaluation.images.{_name}": NOWHERE}
for _name in ("steps", "guidance", "height", "width", "text_length", "batch", "scheduler"):
    MATTERS[f"diffusion.{_name}"] = SAMPLED
NEVER = ("tracking", "figures", "device", "save", "sparsity_config", "preflight", "tags", "plan", "rerun")
NEVER += tuple(f"pipeline.{name}" for name in ("activations", "weights", "by_blocks", "resume"))
MOMENTS = ("model", "calibration", "seed", "engine.precision", "sparsity.heads", "sparsity.neurons")
MOMENTS += tuple(f"pipeline.{name}" for name in ("layers", "skip", "true_sequential", "batch"))

# Other values of the leaves that no type suggests. The first one that differs from the present value is taken.
ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "model.path": ("one", "two"),
    "model.embedded": ("smollm2-135m", None),
    "model.revision": ("main",),
    "model.blocks": ("model.layers",),
    "sparsity.pattern": ("4:8", "2:4"),
    "method.name": ("magnitude",),
    "method.options": ({"some": 1},),
    "method.layer_options": ({"*mlp*": {"some": 1}},),
    "reorder.score": ("obs",),
    "calibration.embedded": ("wiki", "c4"),
    "evaluation.perplexity.*.embedded": ("c4", "wiki"),
    "evaluation.images.embedded": ("calibration_prompts", "evaluation_prompts"),
    "evaluation.zero_shot.tasks": (["piqa"],),
    "evaluation.zero_shot.include_path": ("one", "two"),
    "evaluation.zero_shot.data_dir": ("two", "one"),
    "evaluation.images.metrics": (["distance", "clip_score"],),
    "evaluation.images.clip": ("one", "two"),
    "evaluation.images.reference": ("two", "one"),
    "pipeline.layers": (["*.0.*"],),
    "pipeline.skip": (["*.1.*"],),
    "diffusion.scheduler": ("DDIMScheduler",),
    "device": ("cpu",),
    "figures.study": (["*.0.*"],),
    "tags": (["a"],),
}
for _group in ("calibration", "evaluation.perplexity.*", "evaluation.images"):
    ALTERNATIVES[f"{_group}.path"] = ("b.jsonl",)
    for _name in ("dataset", "subset", "data_files", "revision", "split", "field", "separator"):
        ALTERNATIVES[f"{_group}.{_name}"] = ("other",)
for _name in ("project", "entity", "group", "name", "job_type"):
    ALTERNATIVES[f"tracking.{_name}"] = ("other",)


def leaves(section: type[Section] = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and types of all settings; the user's own name of a text is ``*``."""
    for name, field in section.model_fields.items():
        kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
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
    """The value of a setting; LookupError where the configuration has no such section."""
    for part in name.split("."):
        if not isinstance(config, dict) or part not in config:
            raise LookupError(name)
        config = config[part]
    return config


def another(name: str, field: Any, value: Any) -> Any:
    """A valid value of a leaf that differs from ``value``."""
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
    """A complete configuration of each mode; the files that it names are written to ``folder``."""
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
        found[name] = located(config, folder)
    return found


def located(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with the names of the made-up files as paths."""
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
    """What is at a path; of what is not there, its name."""
    place = Path(path)
    if not path or not place.exists():
        return path
    return "".join(file.read_text() for file in (sorted(place.rglob("*")) if place.is_dir() else [place]))


def text_of(source: dict[str, Any], prompts: bool) -> str:
    """The fingerprint that a run records of a text: of its documents, or of its prompts."""
    rows = (source["field"], source["rows"])
    if source["path"] is not None:
        plain = source["path"].endswith(".txt")
        facts: Any = (content(source["path"]), ("", source["rows"] if prompts else None) if plain else rows)
    elif source["embedded"] is not None:
        facts = (source["embedded"], source["rows"] if prompts else None)
    else:
        facts = ([source[name] for name in ("dataset", "subset", "data_files", "revision", "split")], rows)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def recorded(config: dict[str, Any]) -> dict[str, Any]:
    """The record of a run with this configuration, as far as reports read it. Its protocol says what a run finds in files."""
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
    """The metrics that a run with this configuration measures."""
    pruned, evaluation = config["method"]["name"] != "dense", config["evaluation"]
    found = ["sparsity", *(["minutes.pruning"] if pruned else [])]
    if config["model"]["kind"] == "diffusion":
        return found + [f"images.{name}" for name in (evaluation["images"] or {"metrics": []})["metrics"]]
    found += [f"perplexity.{name}" for name in evaluation["perplexity"]]
    found += [f"zero_shot.{task}" for task in evaluation["zero_shot"]["tasks"]]
    timed = evaluation["speed"] and pruned and config["sparsity"]["pattern"] == "2:4"
    return found + (["speed.dense_seconds"] if timed else [])


def view(config: dict[str, Any]) -> dict[str, Any]:
    """All that a report distinguishes runs by: conditions of each metric, row, column and seed."""
    record, pruned = recorded(config), config["method"]["name"] != "dense"
    found: dict[str, Any] = {metric: conditions(record, metric, SPARSITY) for metric in metrics_of(config)}
    found |= {"row": variant(record), "column": column_of(record, SPARSITY) if pruned else None}
    return json.loads(json.dumps(found | {"seed": config["seed"] if pruned else None}, sort_keys=True))


def cases(config: dict[str, Any], folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """For each leaf of a configuration its name, its name in ``MATTERS``, and the configuration with another valid value."""
    for known, field in LEAVES.items():
        name = known.replace("*", "local")
        try:
            value = at(config, name)
        except LookupError:  # of a section that this configuration lacks
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
