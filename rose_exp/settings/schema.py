"""Typed settings of a run, and every check of them that needs no model and no data.

Each section mirrors a group of ``conf/``. :func:`read_settings` reports all mistakes together.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ..engine import METHODS, Ordering
from ..runtime.errors import SettingsError
from .compatibility import kind_problems, structured_problems
from .diffusion import Built, DiffusionSettings, ImagesSettings, ModelKind
from .messages import embedded_problem, explain, file_problem, looks_local
from .pruning import (
    DENSE,
    AllocationSettings,
    EngineSettings,
    MethodSettings,
    RefineSettings,
    ReorderSettings,
    SparsitySettings,
    TargetSettings,
)
from .section import Count, Positive, Section
from .texts import Bos, CalibrationSettings, PerplexitySettings


class ModelSettings(Section):
    """Which model to prune: ``path`` where it is set, else the embedded one, or of diffusion models the one that is built."""

    kind: ModelKind = "language"
    embedded: str | None = None
    built: Built | None = None  # a small diffusion pipeline with random weights
    path: str | None = None  # a folder in Hugging Face format, a GGUF file, or a hub id
    revision: str | None = None  # of the hub's repository
    # auto: as the checkpoint says; of a diffusion pipeline, which says nothing, float32
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    blocks: str | None = None  # dotted name of the list of decoder blocks; None: found by structure
    # where a BOS token stands; auto: at the start of every window for families that need it, else as the tokenizer adds it
    bos: Literal["auto", Bos] = "auto"
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        return Path(self.path).name if self.path else f"small-{self.built}" if self.built else str(self.embedded)

    def problems(self, where: str) -> list[str]:
        if self.kind == "diffusion":
            return self._diffusion_problems(where)
        if self.built is not None:
            return [f"{where}.built: expected null but for diffusion models, got {self.built!r}"]
        if self.path is None:
            return embedded_problem(f"{where}.embedded", self.embedded, "model")
        return file_problem(f"{where}.path", self.path) if looks_local(self.path) else []

    def _diffusion_problems(self, where: str) -> list[str]:
        missing = [package for package in ("diffusers", "torchmetrics") if importlib.util.find_spec(package) is None]
        if missing:
            return [f"{where}.kind: expected an installed {missing[0]} for diffusion: pip install 'rose_exp[diffusion]'"]
        if (self.path is None) == (self.built is None):
            return [f"{where}: expected one of path and built, got {'none' if self.path is None else 'both'}"]
        return file_problem(f"{where}.path", self.path) if self.path and looks_local(self.path) else []


class ZeroShotSettings(Section):
    """Tasks of lm-eval."""

    tasks: list[str] = Field([])  # none: nothing is measured
    few_shot: Count | None = None  # examples in each prompt; null: as the task says, none for the papers' seven
    limit: Positive | None = None  # only the first so many questions of each task
    batch: Positive | Literal["auto"] = "auto"  # auto: as many as fit on a GPU, 16 on a CPU
    include_path: str | None = None  # a folder of task files beside lm-eval's own
    data: Literal["embedded", "hub"] = "embedded"  # where the papers' seven read their rows; all others read the hub
    data_dir: str | None = None  # a folder with rows of the papers' seven; takes the place of data

    def problems(self, where: str) -> list[str]:
        found = []
        for name in ("include_path", "data_dir"):
            path = getattr(self, name)
            if path is not None and not Path(path).expanduser().is_dir():
                found.append(f"{where}.{name}: expected a folder that exists, got {path!r}")
        if len(set(self.tasks)) != len(self.tasks):
            found.append(f"{where}.tasks: expected each task once, got {', '.join(self.tasks)}")
        if self.few_shot and (self.data_dir is not None or self.data == "embedded"):
            found.append(f"{where}.few_shot: expected 0 or null with local rows, which bring no examples, got {self.few_shot}")
        return found


class SpeedSettings(Section):
    windows: Positive = 1  # at once
    window: Annotated[int, Field(ge=1)] = 2048  # tokens
    repeats: Positive = 10


class EvaluationSettings(Section):
    perplexity: dict[str, PerplexitySettings] = Field({})
    zero_shot: ZeroShotSettings = ZeroShotSettings()
    speed: SpeedSettings | None = None  # null: not measured
    images: ImagesSettings | None = None  # of diffusion models
    batch: Positive = 4  # windows at once on a GPU; a CPU takes one at a time
    at_most: Positive | None = None  # windows of each text, and questions of each task; null: as each says

    def problems(self, where: str) -> list[str]:
        found = [p for name, text in self.perplexity.items() for p in text.problems(f"{where}.perplexity.{name}")]
        found += self.images.problems(f"{where}.images") if self.images is not None else []
        return found + self.zero_shot.problems(f"{where}.zero_shot")


class PipelineSettings(Section):
    layers: list[str] = Field(["*"])  # patterns of full layer names to prune
    skip: list[str] = Field([])  # patterns of full layer names to leave dense
    true_sequential: bool = False  # each group of layers inside a block sees inputs made by the groups already pruned
    batch: Positive = 4  # windows at once on a GPU; a CPU takes one at a time
    activations: Literal["device", "host", "disk"] = "device"  # where the hidden states of all windows are kept
    weights: Literal["auto", "memory", "disk"] = "auto"  # the model's: all in memory, or a block at a time
    by_blocks: bool | Literal["auto"] = "auto"  # measure perplexity so, too; auto: where it must be
    resume: Literal["activations", "recompute", "none"] = "activations"  # what a run that is cut off goes on from
    expert_tokens: Positive = 1  # an expert that fewer calibration tokens are routed to is starved
    starved_experts: Literal["dense", "magnitude", "stop"] = "dense"  # what becomes of it

    def problems(self, where: str) -> list[str]:
        if self.weights == "disk" and self.resume == "none":
            return [f"{where}.resume: expected activations or recompute with weights=disk, which keeps pruned blocks, got none"]
        return []


class TrackingSettings(Section):
    kind: Literal["none", "wandb", "tensorboard", "csv"] = "none"
    mode: Literal["online", "offline", "disabled"] = "offline"  # of W&B
    project: str = "rose_exp"
    entity: str | None = None
    group: str | None = None  # null: the sweep
    name: str | None = None  # null: what differs from the other jobs of the sweep
    job_type: str = "prune"
    save_model: bool = False  # the pruned model as an artifact

    def problems(self, where: str) -> list[str]:
        needed = {"wandb": "wandb", "tensorboard": "tensorboard"}.get(self.kind)
        if needed is None or importlib.util.find_spec(needed):
            return []
        return [f"{where}.kind: expected an installed package, got {self.kind}: pip install {needed}"]


class FiguresSettings(Section):
    draw: bool = True  # PNGs in the run's folder
    study: list[str] = Field([])  # patterns of full layer names whose order is studied


class Settings(Section):
    model: ModelSettings
    sparsity: SparsitySettings
    allocation: AllocationSettings
    method: MethodSettings
    reorder: ReorderSettings
    calibration: CalibrationSettings
    evaluation: EvaluationSettings
    engine: EngineSettings
    refine: RefineSettings
    target: TargetSettings
    pipeline: PipelineSettings
    diffusion: DiffusionSettings = DiffusionSettings()
    tracking: TrackingSettings
    figures: FiguresSettings
    seed: Count
    device: str | list[str]  # a list: any of these that no other job of a sweep is using
    save: bool
    sparsity_config: bool = False  # a saved N:M model says so in the terms of compressed-tensors
    preflight: bool = True  # a run that does not fit is refused
    tags: list[str] = Field([])  # for a person to find the run by
    plan: bool = False  # the jobs are listed and none is run
    rerun: bool = False  # also what is finished already

    @property
    def label(self) -> str:
        """The method as the literature calls it, followed by its ordering, unless it is ROSE's, and by the options that act."""
        from .effects import acting, effective  # which read these settings

        if not self.pruned:
            return "Dense"
        config = self.model_dump(mode="json")
        parts, values, refine = acting(config), effective(config), self.refine
        label = self._method_label("order" in parts)
        if "allocation" in parts:
            outlier = values.get("allocation.outlier", 5)  # 5: the default of OWL's authors
            label += f" + {self.allocation.rule} {self.allocation.spread:g}" + (f"/{outlier:g}" if outlier != 5 else "")
        if "permutation" in parts:
            label += " + permuted"
        if "target" in parts:
            label += f" + target {self.target.strength:g}/{self.target.residual:g}"
        if "refinement" in parts:
            label += f" + masks again {refine.mask_iterations}" if refine.mask_iterations else ""
            label += f" + refine {refine.steps}" if refine.steps else ""
        return label

    def _method_label(self, ordered: bool) -> str:
        label = METHODS[self.method.name].__name__
        diffusion = self.model.kind == "diffusion" and self.method.name == "sparsegpt"
        label = "OBS-Diff" if diffusion else label
        if not ordered:
            return label
        ordering = self.reorder.build()
        if self.method.name == "sparsegpt" and ordering == Ordering.rose():
            return "OBS-Diff in ROSE's order" if diffusion else "ROSE"
        always = "always" if ordering.threshold is None else f"over {ordering.threshold:g}"
        return f"{label} (columns {ordering.columns}, blocks {ordering.blocks}, {always}, by {ordering.score})"

    def on(self, device: str) -> Settings:
        """The same on one device."""
        return self.model_copy(update={"device": device})

    @property
    def pruned(self) -> bool:
        return self.method.name != DENSE


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Check a resolved configuration and turn it into settings.

    Raises:
        SettingsError: with every mistake found, each naming the setting, what was expected and what came.
    """
    problems = [f"{where}: expected a value, got none" for where in _missing(config)]
    if problems:
        raise SettingsError(problems)
    try:
        settings = Settings.model_validate(dict(config))
    except ValidationError as error:
        settings = None
        problems += dict.fromkeys(explain(mistake, Settings) for mistake in error.errors())
    wrong = {problem.split(".")[0].split(":")[0] for problem in problems}
    sections = {}
    for name, field in Settings.model_fields.items():
        if name in wrong or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            continue
        sections[name] = field.annotation.model_validate(config.get(name, {}))
        problems += sections[name].problems(name)
    problems += _cross_problems(sections | {name: config.get(name) for name in ("save", "sparsity_config")})
    if problems:
        raise SettingsError(problems)
    return settings


def _missing(config: Mapping[str, Any], where: str = "") -> list[str]:
    """Names of the settings that a configuration file leaves to the user ('???') and nobody has set."""
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            found += _missing(value, f"{where}{name}.")
        elif value == "???":
            found.append(f"{where}{name}")
    return found


def _cross_problems(sections: Mapping[str, Any]) -> list[str]:
    """Mistakes that take two sections to see, of those sections that are sound."""
    found = _order_problems(sections) + kind_problems(sections) + structured_problems(sections)
    method, refine = sections.get("method"), sections.get("refine")
    if (
        method is not None
        and refine is not None
        and refine.build()
        and method.name in METHODS
        and not METHODS[method.name].sparse
    ):
        found.append(
            f"refine: expected none with {method.name}, which adds a matrix to the pruned one, got {refine.steps} steps and "
            f"{refine.mask_iterations} mask_iterations"
        )
    tracking = sections.get("tracking")
    sparsity = sections.get("sparsity")
    allocation = sections.get("allocation")
    if allocation is not None and allocation.build() and sparsity is not None and sparsity.pattern != "unstructured":
        found.append(
            f"allocation.rule: expected uniform with pattern {sparsity.pattern}, which takes the same share of every layer, "
            f"got {allocation.rule}"
        )
    if sections["sparsity_config"] and (not sections["save"] or (sparsity is not None and sparsity.pattern == "unstructured")):
        found.append("sparsity_config: expected false unless save=true and sparsity is N:M, got true")
    if tracking is not None and tracking.save_model and not sections["save"]:
        found.append("tracking.save_model: expected false without save=true, got true: there is no saved model to keep")
    return found


def _order_problems(sections: Mapping[str, Any]) -> list[str]:
    method, reorder = sections.get("method"), sections.get("reorder")
    if method is None or reorder is None or reorder.problems("reorder") or reorder.build() is None:
        return []
    sequential = [name for name, kind in METHODS.items() if kind.sequential]
    if method.name in sequential or method.name not in (DENSE, *METHODS):
        return []
    return [
        f"reorder: expected none, since method {method.name} prunes no column before another; "
        f"an order goes with {', '.join(sequential)}"
    ]
