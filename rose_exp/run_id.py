"""What a run is called: a fingerprint of all settings that can change its result, and of no other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .dotted import flat, without
from .engine import Structured
from .errors import SettingsError
from .fingerprint import content_sha256, folder_sha256
from .settings import DENSE, Settings, read_settings
from .text_settings import PROMPTS, TextSettings, prompts_file, text_format
from .wheels import WHEELS

LENGTH = 12  # hexadecimal digits: a clash among a million runs has a chance of 1 in 500
WITHOUT_EFFECT = ("device", "tracking", "figures", "save", "sparsity_config", "tags", "plan", "rerun", "preflight")
WITHOUT_EFFECT += ("pipeline.activations", "pipeline.weights", "pipeline.resume", "pipeline.by_blocks")
ONLY_OF_PRUNED = ("sparsity", "reorder", "calibration", "engine", "seed", "pipeline.true_sequential", "pipeline.batch")
ONLY_OF_PRUNED += ("pipeline.expert_tokens", "pipeline.starved_experts", "allocation", "refine", "target")
ONLY_OF_DIFFUSION = ("diffusion", "model.kind", "model.built", "evaluation.images")
ONLY_OF_LANGUAGE = ("model.blocks", "pipeline.true_sequential", "pipeline.batch", "pipeline.expert_tokens")
ONLY_OF_LANGUAGE += ("pipeline.starved_experts", "evaluation.batch", "evaluation.perplexity", "evaluation.zero_shot")
ONLY_OF_PRUNED_DIFFUSION = tuple(f"diffusion.{name}" for name in ("packages", "weighting", "alpha_min", "alpha_max"))
UNKNOWN = "unknown"


def run_id(settings: Settings) -> str:
    """Twelve hexadecimal digits, equal for settings that must lead to equal results.

    The settings count as resolved, so that another default in a configuration file makes another run. Files count by their
    content, not by their place, and embedded ones by that of the wheel they are in. Of a dense model all that only pruning
    could use is left out.
    """
    text = json.dumps(identifying(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def identifying(settings: Settings) -> dict[str, Any]:
    """The settings that count, as :func:`run_id` sees them, by dotted name."""
    values = settings.model_dump(mode="json")
    sparsity = settings.sparsity.build()
    values["sparsity"] = repr(sparsity) if isinstance(sparsity, Structured) else str(sparsity)
    values["method"]["layer_options"] = list(values["method"]["layer_options"].items())  # of several that fit the first counts
    if settings.reorder.build() is None:
        values["reorder"] = None
    if settings.allocation.build() is None:
        values["allocation"] = None
    elif settings.allocation.rule == "losses":
        values["allocation"]["outlier"] = None
    if settings.sparsity.pattern == "unstructured":
        values["engine"]["permute"] = False  # of no effect
    values["model"] |= _place(settings.model.path, settings.model.embedded)
    values["calibration"] |= _text_place(settings.calibration)
    for name, text in settings.evaluation.perplexity.items():
        values["evaluation"]["perplexity"][name] |= _text_place(text)
    if settings.evaluation.images is not None:
        images = settings.evaluation.images
        values["evaluation"]["images"] |= _text_place(images) | images.fingerprints()
    for name in ("include_path", "data_dir"):
        folder = values["evaluation"]["zero_shot"][name]
        if folder is not None:
            values["evaluation"]["zero_shot"][name] = folder_sha256(Path(folder).expanduser())
    dense, diffusion = settings.method.name == DENSE, settings.model.kind == "diffusion"
    left_out = WITHOUT_EFFECT + (ONLY_OF_PRUNED if dense else ())
    left_out += ONLY_OF_LANGUAGE if diffusion else ONLY_OF_DIFFUSION
    left_out += ONLY_OF_PRUNED_DIFFUSION if diffusion and dense else ()
    return without(flat(values), left_out)


def _text_place(text: TextSettings) -> dict[str, Any]:
    """Where a text is from; what stands behind the first that is set has no effect."""
    place = _place(text.path, text.embedded)
    if text.path is not None:
        place["format"] = text_format(text.path)  # decides how the file is read
    if text.path is not None or text.embedded is not None:
        place |= dict.fromkeys(("dataset", "subset", "data_files", "revision", "split"))
    return place


def _place(path: str | None, embedded: str | None) -> dict[str, Any]:
    if path is not None:
        place = Path(path).expanduser()
        return {"path": folder_sha256(place) if place.exists() else path, "embedded": None}
    if embedded in PROMPTS:
        return {"path": None, "embedded": content_sha256(prompts_file(embedded))}
    return {"path": None, "embedded": WHEELS[embedded].sha256 if embedded is not None else None}


def _resolved_run_id(*, _root_: DictConfig) -> str:
    plain = OmegaConf.create({name: _root_._get_node(name) for name in _root_ if name != "hydra"})
    try:
        return run_id(read_settings(OmegaConf.to_container(plain, resolve=True)))
    except SettingsError:
        return UNKNOWN  # of a configuration that is shown, not run


def register_resolver() -> None:
    """Let configuration files say ``${run_id:}``, and ``${unstructured_else:PATTERN,A,B}``: A with this pattern, else B."""
    OmegaConf.register_new_resolver("run_id", _resolved_run_id, replace=True)
    OmegaConf.register_new_resolver("unstructured_else", lambda kind, a, b: a if kind == "unstructured" else b, replace=True)
