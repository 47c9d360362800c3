"""Typed settings of a run, and every check of them that needs no model and no data.

Each section mirrors a group of ``conf/``. :func:`read_settings` reports all mistakes together.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .engine import METHODS, Method, Ordering, Precision, Refine, SemiStructured, Sparsity, Target, Unstructured
from .engine.kernels import Backend
from .engine.ordering import Direction
from .engine.scores import SCORES
from .errors import SettingsError, suggest
from .mistakes import embedded_problem, explain, file_problem, looks_local

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
DENSE = "dense"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def problems(self, where: str) -> list[str]:
        """Mistakes that no single field shows; ``where`` is the section's name."""
        return []


class ModelSettings(Section):
    """Which model to prune: ``path`` where it is set, else the embedded one."""

    embedded: str | None = None
    path: str | None = None  # a folder in Hugging Face format, a GGUF file, or a hub id
    revision: str | None = None  # of the hub's repository
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # auto: as the checkpoint says
    blocks: str | None = None  # dotted name of the list of decoder blocks; None: found by structure
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        return Path(self.path).name if self.path else str(self.embedded)

    def problems(self, where: str) -> list[str]:
        if self.path is None:
            return embedded_problem(f"{where}.embedded", self.embedded, "model")
        return file_problem(f"{where}.path", self.path) if looks_local(self.path) else []


class SparsitySettings(Section):
    pattern: str  # unstructured, or N:M, which prunes N of every M consecutive weights of a row
    ratio: Annotated[float, Field(ge=0, le=1)] | None = None  # unstructured only

    def problems(self, where: str) -> list[str]:
        if self.pattern == "unstructured":
            return [] if self.ratio is not None else [f"{where}.ratio: expected a number from 0 to 1, got null"]
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not found:
            hint = suggest(self.pattern, ["unstructured", "2:4", "4:8"])
            return [f"{where}.pattern: expected 'unstructured' or 'N:M' such as 2:4, got {self.pattern!r}{hint}"]
        pruned, group = int(found[1]), int(found[2])
        if group < 1 or pruned > group:
            return [f"{where}.pattern: expected N:M with N at most M and M at least 1, got {self.pattern!r}"]
        if self.ratio is not None and not math.isclose(self.ratio, pruned / group):
            expected = f"null or {pruned / group:g}, as pattern {self.pattern} says"
            return [f"{where}.ratio: expected {expected}, got {self.ratio:g}"]
        return []

    def build(self) -> Sparsity:
        if self.pattern == "unstructured":
            return Unstructured(self.ratio)
        return SemiStructured(*map(int, self.pattern.split(":")))


class MethodSettings(Section):
    name: str
    options: dict[str, Any] = {}  # of the method, for all layers
    layer_options: dict[str, dict[str, Any]] = {}  # the same for layers whose full name matches a pattern

    def problems(self, where: str) -> list[str]:
        known = [DENSE, *METHODS]
        if self.name not in known:
            return [f"{where}.name: expected one of {', '.join(known)}, got {self.name!r}{suggest(self.name, known)}"]
        found = []
        for place, options in [
            ("options", self.options),
            *((f"layer_options.{p}", o) for p, o in self.layer_options.items()),
        ]:
            found += self._option_problems(f"{where}.{place}", options)
        return found

    def _option_problems(self, where: str, options: dict[str, Any]) -> list[str]:
        if self.name == DENSE:
            return [f"{where}: expected none for {DENSE}, got {', '.join(options)}"] if options else []
        known = [field.name for field in dataclasses.fields(METHODS[self.name])]
        unknown = [name for name in options if name not in known]
        if unknown:
            expected = f"one of {', '.join(known)}" if known else f"none, {self.name} has no options"
            return [f"{where}.{name}: expected {expected}{suggest(name, known)}" for name in unknown]
        try:
            METHODS[self.name](**options)
        except (TypeError, ValueError) as error:
            return [f"{where}.{error}"]
        return []

    def build(self, patterns: tuple[str, ...] = ()) -> Method:
        """The method with its options, and with those of the ``layer_options`` named."""
        options = dict(self.options)
        for pattern in patterns:
            options |= self.layer_options[pattern]
        return METHODS[self.name](**options)


class ReorderSettings(Section):
    """See :class:`rose_exp.engine.Ordering`."""

    columns: Direction = "none"
    blocks: Direction = "none"
    threshold: Annotated[float, Field(ge=0, le=1)] | None = 0.5  # null: every layer is reordered
    score: str = "wanda"

    def problems(self, where: str) -> list[str]:
        if self.score in SCORES:
            return []
        return [f"{where}.score: expected one of {', '.join(SCORES)}, got {self.score!r}{suggest(self.score, SCORES)}"]

    def build(self) -> Ordering | None:
        if self.columns == "none" and self.blocks == "none":
            return None
        return Ordering(self.columns, self.blocks, self.threshold, self.score)


class TextSettings(Section):
    """Where a text comes from: the embedded set, a local file, or a data set of the hub; the first of these that is set."""

    path: str | None = None  # a text file, or a .jsonl file with the text in ``field``
    embedded: str | None = None
    dataset: str | None = None
    subset: str | None = None
    data_files: str | None = None
    revision: str | None = None
    split: str | None = None
    field: str = "text"
    rows: Positive | None = None  # only the first so many documents
    separator: str = "\n\n"  # between documents that are joined

    def problems(self, where: str) -> list[str]:
        if self.path is not None:
            return file_problem(f"{where}.path", self.path, folder=False)
        if self.embedded is not None:
            return embedded_problem(f"{where}.embedded", self.embedded, "text")
        if self.dataset is None:
            return [f"{where}: expected one of path, embedded or dataset, got none of them"]
        return [] if self.split else [f"{where}.split: expected a split of {self.dataset}, got null"]


class CalibrationSettings(TextSettings):
    samples: Positive  # windows
    window: Annotated[int, Field(ge=2)]  # tokens
    draw: Literal["windows", "documents"] = "windows"  # from the joined text, or one from each of random long documents


class PerplexitySettings(TextSettings):
    window: Annotated[int, Field(ge=2)]  # tokens
    windows: Positive | None = None  # only the first so many; null: all


class ZeroShotSettings(Section):
    """Tasks of lm-eval."""

    tasks: list[str] = []  # none: nothing is measured
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
    perplexity: dict[str, PerplexitySettings] = {}
    zero_shot: ZeroShotSettings = ZeroShotSettings()
    speed: SpeedSettings | None = None  # null: not measured
    batch: Positive = 4  # windows at once; no result depends on it beyond rounding
    at_most: Positive | None = None  # windows of each text, and questions of each task; null: as each says

    def problems(self, where: str) -> list[str]:
        found = [p for name, text in self.perplexity.items() for p in text.problems(f"{where}.perplexity.{name}")]
        return found + self.zero_shot.problems(f"{where}.zero_shot")


class EngineSettings(Section):
    """See :func:`rose_exp.engine.prune_layer`."""

    block_size: Positive = 128
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    backend: Backend = "auto"
    precision: Precision = "float32"  # of the moments' products, see InputMoments


class RefineSettings(Section):
    """See :class:`rose_exp.engine.Refine`."""

    steps: Count = 0
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    mask_iterations: Count = 0
    penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    growth: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.8
    every: Positive = 5

    def build(self) -> Refine:
        return Refine(**self.model_dump())


class TargetSettings(Section):
    """See :class:`rose_exp.engine.Target`."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    residual: Annotated[float, Field(ge=0, le=1)] = 0.0
    damping: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    def build(self) -> Target | None:
        """None: the dense layer, with nothing kept for anything else."""
        return Target(**self.model_dump()) or None


class PipelineSettings(Section):
    layers: list[str] = ["*"]  # patterns of full layer names to prune
    skip: list[str] = []  # patterns of full layer names to leave dense
    true_sequential: bool = False  # each group of layers inside a block sees inputs made by the groups already pruned
    batch: Positive = 4  # windows at once; no result depends on it beyond rounding
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
    study: list[str] = []  # patterns of full layer names whose order is studied


class Settings(Section):
    model: ModelSettings
    sparsity: SparsitySettings
    method: MethodSettings
    reorder: ReorderSettings
    calibration: CalibrationSettings
    evaluation: EvaluationSettings
    engine: EngineSettings
    refine: RefineSettings
    target: TargetSettings
    pipeline: PipelineSettings
    tracking: TrackingSettings
    figures: FiguresSettings
    seed: Count
    device: str | list[str]  # a list: any of these that no other job of a sweep is using
    save: bool
    sparsity_config: bool = False  # a saved N:M model says so in the terms of compressed-tensors
    preflight: bool = True  # a run that does not fit is refused
    tags: list[str] = []  # for a person to find the run by
    plan: bool = False  # the jobs are listed and none is run
    rerun: bool = False  # also what is finished already

    @property
    def label(self) -> str:
        """The method as the literature calls it; any ordering that is not ROSE's, and what comes on top, is spelt out."""
        if not self.pruned:
            return "Dense"
        refine, target = self.refine.build(), self.target.build()
        return (
            self._method_label
            + (f" + target {target.strength:g}/{target.residual:g}" if target else "")
            + (f" + masks again {refine.mask_iterations}" if refine.mask_iterations else "")
            + (f" + refine {refine.steps}" if refine.steps else "")
        )

    @property
    def _method_label(self) -> str:
        label = METHODS[self.method.name].__name__
        ordering = self.reorder.build()
        if ordering is None:
            return label
        if self.method.name == "sparsegpt" and ordering == Ordering.rose():
            return "ROSE"
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
        sections[name] = field.annotation.model_validate(config[name])
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
    found = _order_problems(sections)
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
