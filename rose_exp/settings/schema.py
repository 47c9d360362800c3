"""Typed settings of a run, and all checks that need neither the model nor data.

Each section mirrors a group of ``conf/``. :func:`read_settings` reports all errors at once.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ..engine import METHODS, Allocation, EngineOptions, Ordering, Refine, Target
from ..engine.bounds import Count, Positive
from ..runtime.errors import RoseExpError, SettingsError, suggest
from .compatibility import STRUCTURED, kind_problems, structured_problems
from .diffusion import PIPELINES, Built, DiffusionSettings, ImagesSettings, ModelKind, Omissible
from .messages import embedded_problem, explain, file_problem, looks_local
from .plugins import install_plugins
from .pruning import DENSE, MethodSettings, PipelineSettings, SparsitySettings
from .reconstruction import Reconstruction
from .resolvers import register_resolvers
from .section import Section, is_section, problems_of
from .texts import Bos, CalibrationSettings, PerplexitySettings
from .tracking import TrackingSettings

register_resolvers()  # everything that reads a configuration file imports this module


class ModelSettings(Section):
    """The model: ``path`` if it is set, else, for diffusion, ``built`` if it is set, else ``embedded``."""

    kind: ModelKind = "language"
    embedded: str | None = None
    built: Built | None = None  # a small diffusion pipeline with random weights
    path: str | None = None  # a folder in Hugging Face format, a GGUF file, or a hub ID
    revision: str | None = None  # branch, tag or commit on the hub
    variant: str | None = (
        None  # variant of the weight files of a diffusion pipeline, such as fp16; null: those without a variant
    )
    omit: list[Omissible] = Field([])  # components of a diffusion pipeline to leave out
    # auto: the checkpoint's; float32 for a diffusion pipeline, which does not state it
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    blocks: str | None = None  # dotted name of the list of decoder blocks; None: detected from the model's structure
    # position of BOS tokens; auto: at the start of every window for families that need it, else where the tokenizer adds it
    bos: Literal["auto", Bos] = "auto"
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        return Path(self.path).name if self.path else f"small-{self.built}" if self.built else str(self.embedded)

    def problems(self, where: str) -> list[str]:
        if self.kind == "diffusion":
            return self._diffusion_problems(where)
        for name in ("built", "variant", "omit"):
            if value := getattr(self, name):
                expected = "none" if name == "omit" else "null"
                return [f"{where}.{name}: expected {expected} unless model.kind is diffusion, got {value!r}"]
        if self.path is None:
            return embedded_problem(f"{where}.embedded", self.embedded, "model")
        return file_problem(f"{where}.path", self.path) if looks_local(self.path) else []

    def _diffusion_problems(self, where: str) -> list[str]:
        missing = [package for package in ("diffusers", "torchmetrics") if importlib.util.find_spec(package) is None]
        if missing:
            return [f"{where}.kind: expected an installed {missing[0]} for diffusion: pip install 'rose_exp[diffusion]'"]
        if self.path is not None and self.built is not None:
            return [f"{where}: expected at most one of path and built, got both"]
        if self.path is None and self.built is None and self.embedded not in PIPELINES:
            expected = f"one of {', '.join(PIPELINES)}, or a value for path or built"
            return [f"{where}.embedded: expected {expected}, got {self.embedded!r}{suggest(str(self.embedded), PIPELINES)}"]
        if self.variant is not None and (self.path is None or not re.fullmatch(r"\w[\w-]*", self.variant)):
            expected = "null with model.built" if self.path is None else "a name such as fp16"
            return [f"{where}.variant: expected {expected}, got {self.variant!r}"]
        return file_problem(f"{where}.path", self.path) if self.path and looks_local(self.path) else []


class ZeroShotSettings(Section):
    """Zero-shot evaluation on tasks of lm-eval."""

    tasks: list[str] = Field([])  # none: no zero-shot evaluation
    few_shot: Count | None = None  # examples in each prompt; null: the task's default, which is none for the papers' seven
    limit: Positive | None = None  # use only the first N questions of each task
    batch: Positive | Literal["auto"] = "auto"  # auto: the largest batch that fits on a GPU, 16 on a CPU
    include_path: str | None = None  # a folder with additional task files
    data: Literal["embedded", "hub"] = "embedded"  # source of the papers' seven tasks; other tasks always use the hub
    data_dir: str | None = None  # a folder with files of the papers' seven tasks; takes precedence over data

    def problems(self, where: str) -> list[str]:
        problems = []
        for name in ("include_path", "data_dir"):
            path = getattr(self, name)
            if path is not None and not os.path.isdir(os.path.expanduser(path)):
                problems.append(f"{where}.{name}: expected a folder that exists, got {path!r}")
        if len(set(self.tasks)) != len(self.tasks):
            problems.append(f"{where}.tasks: expected each task once, got {', '.join(self.tasks)}")
        if self.few_shot and (self.data_dir is not None or self.data == "embedded"):
            problems.append(
                f"{where}.few_shot: expected 0 or null with local rows, which have no examples, got {self.few_shot}"
            )
        return problems


class SpeedSettings(Section):
    windows: Positive = 1  # batch size
    window: Positive = 2048  # tokens
    repeats: Positive = 10


class EvaluationSettings(Section):
    perplexity: dict[str, PerplexitySettings] = Field({})
    zero_shot: ZeroShotSettings = ZeroShotSettings()
    speed: SpeedSettings | None = None  # null: not measured
    images: ImagesSettings | None = None  # diffusion models only
    divergence: bool = False  # also measure the divergence from the dense model's predictions
    batch: Positive = 4  # batch size on a GPU in windows; a CPU always uses 1
    limit: Positive | None = None  # limit of windows per text and of questions per task; null: only their own limits

    def problems(self, where: str) -> list[str]:
        problems = [p for name, text in self.perplexity.items() for p in text.problems(f"{where}.perplexity.{name}")]
        problems += self.images.problems(f"{where}.images") if self.images is not None else []
        return problems + self.zero_shot.problems(f"{where}.zero_shot")


class FiguresSettings(Section):
    draw: bool = True  # draw PNGs in the run's folder
    study: list[str] = Field([])  # patterns of the full names of layers whose pruning order to study


class Settings(Section):
    model: ModelSettings
    sparsity: SparsitySettings
    allocation: Allocation
    method: MethodSettings
    reorder: Ordering
    calibration: CalibrationSettings
    evaluation: EvaluationSettings
    engine: EngineOptions
    refine: Refine
    target: Target
    reconstruction: Reconstruction = Reconstruction()
    pipeline: PipelineSettings
    diffusion: DiffusionSettings = DiffusionSettings()
    tracking: TrackingSettings = TrackingSettings()
    figures: FiguresSettings
    seed: Count
    device: str | list[str]  # a list: any device in it that no other job of a sweep uses
    save: bool
    sparsity_config: bool = False  # describe N:M sparsity in a saved model in the format of compressed-tensors
    preflight: bool = True  # refuse a run that does not fit into memory or on disk
    tags: list[str] = Field([])  # tags in the run record and in W&B
    plan: bool = False  # list the jobs without running them
    rerun: bool = False  # repeat finished runs

    @property
    def label(self) -> str:
        """A short name of the method and the options in effect; the report adds their values where labels would be equal."""
        from .effective import acting  # imports this module

        if not self.pruned:
            return "Dense"
        parts = acting(self.model_dump(mode="json"))
        label = self._method_label("order" in parts)
        extended = {"target", "refinement"} <= parts and parts & {"allocation", "permutation"} and self.refine.mask_iterations
        names = {"allocation": "OWL" if self.allocation.rule == "owl" else self.allocation.rule, "permutation": "permuted"}
        names |= {"target": "target", "refinement": "ADMM" if self.refine.mask_iterations else "CG"}
        if label == "ROSE" and extended:
            label, names = "ROSE+", {}
        names |= {"reconstruction": "reconstruction"}
        return " + ".join([label, *(name for part, name in names.items() if part in parts)])

    def _method_label(self, ordered: bool) -> str:
        """Return the method's name in the literature. SparseGPT in the order of ROSE is ROSE, for diffusion it is OBS-Diff."""
        label = METHODS[self.method.name].__name__
        sparsegpt, diffusion = self.method.name == "sparsegpt", self.model.kind == "diffusion"
        label = "OBS-Diff" if diffusion and sparsegpt else label
        if not ordered:
            return label
        if sparsegpt and self.reorder == Ordering.rose():
            return "OBS-Diff in ROSE's order" if diffusion else "ROSE"
        return f"{label} reordered"

    def on(self, device: str) -> Settings:
        """Return these settings with one device."""
        return self.model_copy(update={"device": device})

    @property
    def removes(self) -> bool:
        """Whether the run removes heads and neurons, so that layers shrink."""
        return self.pruned and self.sparsity.pattern == STRUCTURED

    @property
    def pruned(self) -> bool:
        return self.method.name != DENSE


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Check a resolved configuration and turn it into settings.

    Raises:
        SettingsError: the configuration has errors. The message lists all of them.
    """
    try:
        install_plugins()
    except RoseExpError as error:
        raise SettingsError([str(error)]) from error
    problems = [f"{setting}: expected a value, got none" for setting in _missing(config)]
    if problems:
        raise SettingsError(problems)
    try:
        settings = Settings.model_validate(dict(config))
    except ValidationError as error:
        settings = None
        problems += dict.fromkeys(explain(mistake, Settings) for mistake in error.errors())
    invalid = {problem.split(".")[0].split(":")[0] for problem in problems}
    sections = {}
    for name, field in Settings.model_fields.items():
        if name not in invalid and is_section(field.annotation):
            sections[name] = TypeAdapter(field.annotation).validate_python(config.get(name, {}))
            problems += problems_of(sections[name], name)
    problems += _cross_problems(sections | {name: config.get(name) for name in ("save", "sparsity_config", "tags")})
    if problems:
        raise SettingsError(problems)
    return settings


def applied(config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return a resolved configuration without a ratio that its N:M pattern ignores, so that a record contains what was done."""
    if settings.sparsity.contradiction("sparsity") is None:
        return dict(config)
    return {**config, "sparsity": {**config["sparsity"], "ratio": None}}


def _missing(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the names of required settings ('???') that have no value."""
    missing = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            missing += _missing(value, f"{prefix}{name}.")
        elif value == "???":
            missing.append(f"{prefix}{name}")
    return missing


def _cross_problems(sections: Mapping[str, Any]) -> list[str]:
    """Return the errors that involve several sections.

    Args:
        sections: the sections without errors of their own, by name.
    """
    problems = _order_problems(sections) + kind_problems(sections) + structured_problems(sections)
    method, refine = sections.get("method"), sections.get("refine")
    if method is not None and refine and method.name in METHODS and not METHODS[method.name].sparse:
        problems.append(
            f"refine: expected none with {method.name}, whose result is not sparse, got {refine.steps} steps and "
            f"{refine.mask_iterations} mask_iterations"
        )
    reconstruction = sections.get("reconstruction")
    if method is not None and reconstruction and method.name in METHODS and not METHODS[method.name].sparse:
        problems.append(
            f"reconstruction: expected none with {method.name}, whose result is not sparse, got {reconstruction.epochs} epochs"
        )
    tracking = sections.get("tracking")
    sparsity = sections.get("sparsity")
    allocation = sections.get("allocation")
    if allocation and sparsity is not None and sparsity.pattern != "unstructured":
        problems.append(
            f"allocation.rule: expected uniform with pattern {sparsity.pattern}, which requires equal sparsity in every layer, "
            f"got {allocation.rule}"
        )
    if sections["sparsity_config"] and (not sections["save"] or (sparsity is not None and sparsity.pattern == "unstructured")):
        problems.append("sparsity_config: expected false unless save=true and sparsity is N:M, got true")
    if tracking is not None and isinstance(sections["tags"], list):
        problems += tracking.tag_problems([tag for tag in sections["tags"] if isinstance(tag, str)])
    if tracking is not None and tracking.wandb is not None and tracking.wandb.save_model and not sections["save"]:
        problems.append("tracking.wandb.save_model: expected false without save=true, got true")
    return problems


def _order_problems(sections: Mapping[str, Any]) -> list[str]:
    method, reorder = sections.get("method"), sections.get("reorder")
    if method is None or not reorder:
        return []
    sequential = [name for name, kind in METHODS.items() if kind.sequential]
    if method.name in sequential or method.name not in (DENSE, *METHODS):
        return []
    return [
        f"reorder: expected none, because method {method.name} does not prune columns sequentially; "
        f"reordering supports {', '.join(sequential)}"
    ]
