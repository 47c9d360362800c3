"""Modes of a run and what each setting can change in them, listed independently of the table under test."""

from __future__ import annotations

from typing import Any

SPEED = {"windows": 1, "window": 64, "repeats": 3}
LOCAL = "evaluation.perplexity.local"
HUB_TEXT = {"path": None, "embedded": None, "dataset": "a/b", "subset": "s", "data_files": "f", "revision": "r", "split": "t"}
PLUGIN_TEXT = HUB_TEXT | {"plugin": "mine"}
HUB = {"model.path": "owner/name"} | {f"evaluation.perplexity.local.{name}": value for name, value in HUB_TEXT.items()}

# Modes of a run, as changes to a pruned local language model with JSON texts or to a pruned diffusion model.
EMBEDDED_MODEL = {"model.path": None, "model.embedded": "smollm2-135m"}
EMBEDDED_TEXT = {"evaluation.perplexity.local.path": None, "evaluation.perplexity.local.embedded": "wiki"}
OPTIONS = {
    **{"reorder.columns": "descending", "allocation.rule": "owl", "refine.steps": 8, "refine.mask_iterations": 12},
    **{"target.strength": 0.5, "reconstruction.epochs": 4, "evaluation.speed": SPEED, "evaluation.zero_shot.tasks": ["piqa"]},
}
TEXTS = {"evaluation.perplexity": {"local": {"path": "a.jsonl", "window": 64}}}
SCORES = {f"evaluation.images.{n}": v for n, v in {"metrics": ["clip_score", "fid"], "clip": "one", "reference": "two"}.items()}
EMBEDDED_PIPELINE = {"model.built": None, "model.embedded": "digits-sd3"}
IMAGES_OF_HUB = {"model.built": None, "model.path": "owner/name"}
IMAGES_OF_HUB |= {f"{group}.{n}": v for group in ("calibration", "evaluation.images") for n, v in HUB_TEXT.items()}
IMAGES_OF_PLUGIN = {f"{group}.{n}": v for group in ("calibration", "evaluation.images") for n, v in PLUGIN_TEXT.items()}
TASKS_OF_FOLDERS = {"evaluation.zero_shot.data_dir": "one", "evaluation.zero_shot.include_path": "two"}
PROMPTS = {"embedded": "evaluation_prompts", "samples": 32, "metrics": ["clip_score", "fid"]}
LANGUAGE: dict[str, dict[str, Any]] = {
    "unstructured": {},
    "ordered": {"reorder.columns": "descending"},
    "n:m": {"sparsity.pattern": "2:4", "sparsity.ratio": None, "evaluation.speed": SPEED},
    "4:8": {"sparsity.pattern": "4:8", "sparsity.ratio": None, "evaluation.speed": SPEED},
    "1:4": {"sparsity.pattern": "1:4", "sparsity.ratio": None},
    "structured": {"sparsity.pattern": "structured"},
    "heads": {"sparsity.pattern": "structured", "sparsity.neurons": False},
    "neurons": {"sparsity.pattern": "structured", "sparsity.heads": False},
    "structured wanda": {"sparsity.pattern": "structured", "method.name": "wanda"},
    "wanda": {"method.name": "wanda"},
    "owl": {"allocation.rule": "owl"},
    "losses": {"allocation.rule": "losses", "evaluation.images": PROMPTS},
    "least squares": {"refine.steps": 8},
    "masks": {"refine.mask_iterations": 12},
    "target": {"target.strength": 0.5},
    "residual": {"target.residual": 0.5},
    "reconstructed": {"reconstruction.epochs": 4},
    "compared": {"evaluation.divergence": True},
    "embedded": EMBEDDED_MODEL | EMBEDDED_TEXT | {"calibration.path": None, "calibration.embedded": "c4"},
    "hub": HUB | {f"calibration.{name}": value for name, value in HUB_TEXT.items()},
    "plugin": {f"{group}.{n}": v for group in ("calibration", LOCAL) for n, v in PLUGIN_TEXT.items()},
    "plain texts": {"calibration.path": "a.txt", "evaluation.perplexity.local.path": "a.txt"},
    "tasks from a folder": TASKS_OF_FOLDERS,
    "dense tasks from a folder": {"method.name": "dense"} | TASKS_OF_FOLDERS,
    "no tasks": {"evaluation.zero_shot.tasks": []},
    "nothing measured": {"evaluation.perplexity": {}, "evaluation.zero_shot.tasks": []},
    "dense": {"method.name": "dense", "evaluation.speed": SPEED, "sparsity.pattern": "2:4"},
    "dense embedded": EMBEDDED_MODEL | EMBEDDED_TEXT | {"method.name": "dense"},
    "dense hub": HUB | {"method.name": "dense"},
    "dense with options": {"method.name": "dense", "sparsity.pattern": "structured", "evaluation.images": PROMPTS} | OPTIONS,
}
DIFFUSION: dict[str, dict[str, Any]] = {
    "images": {},
    "images embedded": EMBEDDED_PIPELINE,
    "images reconstructed": {"reconstruction.epochs": 4, "reconstruction.parts": "together"},
    "images structured": {"sparsity.pattern": "structured"},
    "images structured wanda": {"sparsity.pattern": "structured", "method.name": "wanda"},
    "images ordered": {"reorder.columns": "descending"},
    "images uniform": {"diffusion.weighting": "uniform"},
    "images scored": SCORES,
    "images with options": {"sparsity.pattern": "2:4", "evaluation.images.metrics": ["fid"]} | OPTIONS | TEXTS,
    "images of prompts": {"calibration.path": "a.txt", "evaluation.images.path": "a.txt"},
    "images of rows": {"calibration.path": "a.jsonl", "evaluation.images.path": "a.jsonl"},
    "images of hub": IMAGES_OF_HUB,
    "images of plugin": IMAGES_OF_PLUGIN,
    "no images": {"evaluation.images": None},
    "dense images": {"method.name": "dense"},
    "dense images scored": {"method.name": "dense"} | SCORES,
    "dense images of rows": {"method.name": "dense", "evaluation.images.path": "a.jsonl"},
    "dense images of hub": {"method.name": "dense"} | IMAGES_OF_HUB,
    "dense images with options": {"method.name": "dense", "sparsity.pattern": "2:4"} | OPTIONS | TEXTS,
    "dense no images": {"method.name": "dense", "evaluation.images": None},
}
MODES = LANGUAGE | DIFFUSION
DENSE = {name for name, changes in MODES.items() if changes.get("method.name") == "dense"}
PRUNED = set(MODES) - DENSE
PRUNED_LANGUAGE, PRUNED_DIFFUSION = PRUNED & set(LANGUAGE), PRUNED & set(DIFFUSION)
GROUPS_OF_WEIGHTS = {"n:m", "4:8", "1:4", "images with options"}
STRUCTURED = {"structured", "heads", "neurons", "structured wanda", "images structured", "images structured wanda"}
TEXTS_OF_ROWS = set(LANGUAGE) - {"embedded", "dense embedded", "plain texts"}
JSON_TEXTS = TEXTS_OF_ROWS - {"plugin"}
MEASURED = set(LANGUAGE) - {"nothing measured"}
TASKS = MEASURED - {"no tasks"}
SCORED = {"images scored", "dense images scored"}
LAST = "images with options"
RECONSTRUCTED = {"reconstructed", "images reconstructed", LAST}
IMAGES = set(DIFFUSION) - {"no images", "dense no images"}
SAMPLED = set(DIFFUSION) - {"dense no images"}
NOWHERE: set[str] = set()

# The modes in which each leaf can change a result, listed independently of the table under test.
MATTERS: dict[str, set[str]] = {
    "model.kind": set(MODES),
    "model.embedded": {"embedded", "dense embedded", "images embedded", "dense images embedded"},
    "model.built": set(DIFFUSION),
    "model.path": set(MODES),
    "model.revision": {"hub", "dense hub", "images of hub", "dense images of hub"},
    "model.variant": set(DIFFUSION),
    "model.omit": set(DIFFUSION),
    "model.dtype": set(MODES),
    "model.blocks": set(LANGUAGE),
    "model.bos": set(LANGUAGE),
    "model.trust_remote_code": set(LANGUAGE) - {"embedded", "dense embedded"},
    "sparsity.pattern": PRUNED,
    "sparsity.ratio": PRUNED - GROUPS_OF_WEIGHTS,
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
    "reorder.threshold": {"ordered", "images ordered", LAST},
    "reorder.score": {"ordered", "images ordered", LAST},
    "calibration.path": PRUNED,
    "calibration.embedded": {"embedded", "hub", "plugin", *PRUNED_DIFFUSION} - {"images of prompts", "images of rows"},
    "calibration.field": (PRUNED & JSON_TEXTS) | {"images of rows", "images of hub"},
    "calibration.rows": (PRUNED & TEXTS_OF_ROWS) | PRUNED_DIFFUSION,
    "calibration.separator": PRUNED_LANGUAGE,
    "calibration.samples": PRUNED,
    "calibration.window": PRUNED_LANGUAGE,
    "calibration.draw": PRUNED,
    "calibration.replicate": PRUNED_LANGUAGE,
    "evaluation.perplexity.*.path": MEASURED,
    "evaluation.perplexity.*.embedded": {"embedded", "dense embedded", "hub", "dense hub", "plugin"},
    "evaluation.perplexity.*.field": MEASURED & JSON_TEXTS,
    "evaluation.perplexity.*.rows": MEASURED & TEXTS_OF_ROWS,
    "evaluation.perplexity.*.separator": MEASURED,
    "evaluation.perplexity.*.window": MEASURED,
    "evaluation.perplexity.*.windows": MEASURED,
    "evaluation.zero_shot.tasks": set(LANGUAGE),
    "evaluation.zero_shot.few_shot": TASKS,
    "evaluation.zero_shot.limit": TASKS,
    "evaluation.zero_shot.batch": TASKS,
    "evaluation.zero_shot.include_path": TASKS,
    "evaluation.zero_shot.data": TASKS - {"tasks from a folder", "dense tasks from a folder"},
    "evaluation.zero_shot.data_dir": TASKS,
    "evaluation.speed.windows": {"n:m"},
    "evaluation.speed.window": {"n:m"},
    "evaluation.speed.repeats": {"n:m"},
    "evaluation.images.path": IMAGES,
    "evaluation.images.embedded": IMAGES - {"images of prompts", "images of rows", "dense images of rows"},
    "evaluation.images.field": {"images of rows", "dense images of rows", "images of hub", "dense images of hub"},
    "evaluation.images.rows": IMAGES,
    "evaluation.images.separator": NOWHERE,
    "evaluation.images.samples": IMAGES,
    "evaluation.images.metrics": IMAGES,
    "evaluation.images.clip": SCORED,
    "evaluation.images.reference": {*SCORED, LAST},
    "evaluation.images.sheet": NOWHERE,
    "evaluation.divergence": MEASURED & PRUNED,
    "evaluation.batch": MEASURED,
    "evaluation.limit": MEASURED | IMAGES,
    "engine.block_size": PRUNED,
    "engine.damping": PRUNED,
    "engine.backend": PRUNED,
    "engine.precision": PRUNED,
    "pipeline.permute": GROUPS_OF_WEIGHTS - {LAST},
    "refine.steps": PRUNED,
    "refine.tolerance": {"least squares", LAST},
    "refine.damping": {"least squares", "masks", LAST},
    "refine.mask_iterations": PRUNED,
    "refine.penalty": {"masks", LAST},
    "refine.growth": {"masks", LAST},
    "refine.every": {"masks", LAST},
    "refine.relaxation": {"masks", LAST},
    "reconstruction.epochs": PRUNED,
    **{f"reconstruction.{name}": RECONSTRUCTED for name in ("parts", "rate", "batch", "held_out", "patience")},
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
    MATTERS |= {f"calibration.{_name}": {"hub", "images of hub"}, f"evaluation.perplexity.*.{_name}": {"hub", "dense hub"}}
    MATTERS |= {f"evaluation.images.{_name}": {"images of hub", "dense images of hub"}}
MATTERS["calibration.plugin"] = {"hub", "plugin", "images of hub", "images of plugin"}
MATTERS["evaluation.perplexity.*.plugin"] = {"hub", "dense hub", "plugin"}
MATTERS["evaluation.images.plugin"] = {"images of hub", "dense images of hub", "images of plugin"}
for _name in ("steps", "guidance", "height", "width", "text_length", "batch", "scheduler"):
    MATTERS[f"diffusion.{_name}"] = SAMPLED
NEVER = ("tracking", "figures", "device", "save", "sparsity_config", "preflight", "tags", "plan", "rerun")
NEVER += tuple(f"pipeline.{name}" for name in ("activations", "weights", "by_blocks", "resume"))
MOMENTS = ("model", "calibration", "seed", "engine.precision", "sparsity.heads", "sparsity.neurons")
MOMENTS += tuple(f"pipeline.{name}" for name in ("layers", "skip", "true_sequential", "batch"))

# Alternative values of leaves whose type does not suggest any. The first one that differs from the current value is used.
ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "model.path": ("one", "two"),
    "model.embedded": ("smollm2-135m", None),
    "model.revision": ("main",),
    "model.variant": ("fp16",),
    "model.omit": (["text_encoder_3"],),
    "model.blocks": ("model.layers",),
    "sparsity.pattern": ("4:8", "2:4"),
    "method.name": ("magnitude",),
    "method.options": ({"some": 1},),
    "method.layer_options": ({"*mlp*": {"some": 1}},),
    "reorder.score": ("obs",),
    "calibration.embedded": ("wiki", "c4"),
    "evaluation.perplexity.*.embedded": ("c4", "wiki"),
    "evaluation.images.embedded": ("calibration_prompts", "evaluation_prompts"),
    "evaluation.zero_shot.tasks": (["piqa"], ["boolq"]),
    "evaluation.zero_shot.include_path": ("one", "two"),
    "evaluation.zero_shot.data_dir": ("two", "one"),
    "evaluation.images.metrics": (["distance", "image_reward"],),
    "evaluation.images.clip": ("one", "two"),
    "evaluation.images.reference": ("two", "one"),
    "pipeline.layers": (["*.0.*"],),
    "pipeline.skip": (["*.1.*"],),
    "diffusion.scheduler": ("DDIMScheduler",),
    "diffusion.weighting": ("linear_increase",),
    "device": ("cpu",),
    "figures.study": (["*.0.*"],),
    "tags": (["a"],),
}
for _group in ("calibration", "evaluation.perplexity.*", "evaluation.images"):
    ALTERNATIVES[f"{_group}.path"] = ("b.jsonl",)
    for _name in ("plugin", "dataset", "subset", "data_files", "revision", "split", "field", "separator"):
        ALTERNATIVES[f"{_group}.{_name}"] = ("other",)
for _name in ("project", "entity", "group", "name", "job_type"):
    ALTERNATIVES[f"tracking.wandb.{_name}"] = ("other",)

ROWS = (
    *("method", "reorder", "refine", "target", "allocation", "reconstruction"),
    *("pipeline.permute", "sparsity.saliency", "sparsity.at_once"),
)
PLACES = ("path", "embedded", "plugin", "dataset", "subset", "data_files", "revision", "split", "field", "rows")  # of texts


def concerns(leaf: str, metric: str, dense: bool) -> bool:
    """Return whether a leaf that can change a result can change this metric."""
    kind, name = metric.split(".")[0], leaf.removeprefix("evaluation.")
    kind = "perplexity" if kind in ("kl_divergence", "top1_agreement") else kind
    if name != leaf:
        if name in ("images.metrics", "divergence"):
            return False
        if name in ("images.clip", "images.reference"):
            return metric == {"images.clip": "images.clip_score", "images.reference": "images.fid"}[name]
        if name == "limit":
            return kind in ("perplexity", "zero_shot", "images")
        return kind == ("perplexity" if name == "batch" else name.split(".")[0])
    if dense and leaf in ("model.blocks", "pipeline.layers", "pipeline.skip", "diffusion.convolutions"):
        return metric == "sparsity"
    return kind == "images" or not (dense and leaf.startswith("diffusion."))
