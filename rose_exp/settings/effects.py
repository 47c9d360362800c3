"""Which settings can change which results.

:data:`EFFECTS` is the only definition. The functions of :mod:`rose_exp.settings.effective` apply it to a configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .pruning import DENSE
from .texts import text_format

Mode = tuple[str, bool]
"""The kind of a run's model, and whether the run prunes the model."""

NOTHING: frozenset[Mode] = frozenset()
LANGUAGE: frozenset[Mode] = frozenset({("language", False), ("language", True)})
DIFFUSION: frozenset[Mode] = frozenset({("diffusion", False), ("diffusion", True)})
EVERYTHING = LANGUAGE | DIFFUSION
PRUNED = frozenset(mode for mode in EVERYTHING if mode[1])
PRUNED_LANGUAGE, PRUNED_DIFFUSION = PRUNED & LANGUAGE, PRUNED & DIFFUSION


@dataclass(frozen=True)
class When:
    """The condition under which an option has an effect.

    Attributes:
        reads: names of the settings in the condition. A ``*`` stands for the name of the text to which the option belongs.
        holds: the condition, as a function of their values. The value of a group is whether the configuration has the group.
    """

    reads: tuple[str, ...]
    holds: Callable[..., Any]


@dataclass(frozen=True)
class Effect:
    """What a setting can change.

    Attributes:
        modes: the runs that it can change.
        when: the condition under which it has an effect; if None, always.
        metrics: the metrics, or groups of metrics, that it can change; if None, all of them and the pruned model. Settings with
            an empty tuple only select metrics.
        of_dense: the same for dense models, if it differs.
        role: ``condition``: all results in a table have the same value of this setting; ``row``: the rows of a table compare
            it; ``seed`` and ``replicate``: a table averages over them.
        place: set if results depend on the content that the setting names instead of its value: ``text``, a text file;
            ``files``, a file or folder; ``model``, a model and the files next to it; ``embedded``, an embedded file.
        recorded_as: the field of a run record with the fingerprint of the content that this and related settings select.
            Records with equal fingerprints are comparable even if the settings differ.
        moments: whether it can change the moments of the inputs of a language model's first block.
        ordered: whether the order of a mapping matters.
        unordered: whether the order of a list does not matter.
    """

    modes: frozenset[Mode]
    when: When | None = None
    metrics: tuple[str, ...] | None = None
    of_dense: tuple[str, ...] | None = None
    role: Literal["condition", "row", "seed", "replicate"] = "condition"
    place: Literal["text", "files", "model", "embedded"] | None = None
    recorded_as: str | None = None
    moments: bool = False
    ordered: bool = False
    unordered: bool = False


def _when(*reads: str, holds: Callable[..., Any] = bool) -> When:
    return When(reads, holds)


def _on_hub(path: str | None) -> bool:
    """Return whether a path can be a hub ID, judging only by its text, because records are also read on other machines."""
    return path is not None and not path.startswith((".", "/", "~")) and path.count("/") < 2 and not path.endswith(".gguf")


def _has_documents(path: str | None, embedded: str | None) -> bool:
    """Return whether a text has several documents. A plain text file and an embedded text are one."""
    return embedded is None if path is None else text_format(path) != "text"


def _has_fields(path: str | None, embedded: str | None, plugin: str | None) -> bool:
    """Return whether the documents of a text are fields of rows."""
    return _has_documents(path, embedded) and (path is not None or plugin is None)


def _removes(pattern: str, kind: bool, method: str) -> bool:
    return pattern == "structured" and kind and method == "sparsegpt"


# If all rows of a table must agree in an option, the option must have an effect in all of them or in none. Otherwise their
# conditions differ. Therefore engine.damping counts for every method, although Wanda ignores it.
PATTERN = "sparsity.pattern"
GROUPS_OF_WEIGHTS = _when(PATTERN, holds=lambda pattern: ":" in pattern)  # N:M
SHARES = _when(PATTERN, holds=lambda pattern: ":" not in pattern)
STRUCTURED = _when(PATTERN, holds=lambda pattern: pattern == "structured")
HEADS_BY_OBS = _when(PATTERN, "sparsity.heads", "method.name", holds=_removes)
NEURONS_BY_OBS = _when(PATTERN, "sparsity.neurons", "method.name", holds=_removes)
PERMUTED = _when(PATTERN, "pipeline.permute", holds=lambda pattern, permute: ":" in pattern and permute)
ORDERED = _when("reorder.columns", "reorder.blocks", holds=lambda *orders: set(orders) != {"none"})
ALLOCATED = _when("allocation.rule", holds=lambda rule: rule != "uniform")
BY_OUTLIERS = _when("allocation.rule", holds=lambda rule: rule == "owl")
TARGETED = _when("target.strength", "target.residual", holds=lambda *shares: any(shares))
FITTED = _when("refine.steps")
MASKS_CHOSEN = _when("refine.mask_iterations")
REFINED = _when("refine.steps", "refine.mask_iterations", holds=lambda *counts: any(counts))
RECONSTRUCTED = _when("reconstruction.epochs")
WEIGHTED = _when("diffusion.weighting", holds=lambda weighting: weighting != "uniform")
SAMPLED = _when("method.name", "evaluation.images", holds=lambda method, images: method != DENSE or images)
MEASURED = _when(
    *("model.kind", "evaluation.images", "evaluation.perplexity", "evaluation.zero_shot.tasks"),
    holds=lambda kind, images, *sets: images if kind == "diffusion" else any(sets),
)
PERPLEXITY_MEASURED = _when("evaluation.perplexity")
TASKS_MEASURED = _when("evaluation.zero_shot.tasks")
ROWS_FROM_WHEEL_OR_HUB = _when(
    "evaluation.zero_shot.tasks", "evaluation.zero_shot.data_dir", holds=lambda tasks, folder: tasks and folder is None
)
TIMED = _when(PATTERN, holds=lambda pattern: pattern == "2:4")  # the only pattern with hardware support
SCORED_BY_CLIP = _when("evaluation.images.metrics", holds=lambda metrics: "clip_score" in metrics)
COMPARED_TO_REAL = _when("evaluation.images.metrics", holds=lambda metrics: "fid" in metrics)
MODEL_BY_PATH = _when("model.path", holds=lambda path: path is not None)
MODEL_EMBEDDED = _when(
    *("model.kind", "model.path", "model.built"),
    holds=lambda kind, path, built: path is None and (kind == "language" or built is None),
)
MODEL_ON_HUB = _when("model.path", holds=_on_hub)

COMPONENTS: dict[str, tuple[frozenset[Mode], When]] = {
    "order": (PRUNED, ORDERED),
    "allocation": (PRUNED_LANGUAGE, ALLOCATED),
    "permutation": (PRUNED_LANGUAGE, PERMUTED),
    "target": (PRUNED_LANGUAGE, TARGETED),
    "refinement": (PRUNED, REFINED),
    "reconstruction": (PRUNED, RECONSTRUCTED),
}
"""Optional parts of a run: the runs that can have them, and the condition under which they have an effect."""


def _source(group: str, modes: frozenset[Mode], recorded_as: str, **common: Any) -> dict[str, Effect]:
    """Return the effects of the settings of a text source: a file, an embedded text, another package's or the hub's data set.

    Language models read texts, diffusion models read prompts.
    """
    place, kind = (f"{group}.path", f"{group}.embedded"), "model.kind"
    sources = (*place, f"{group}.plugin")
    unset = _when(place[0], holds=lambda path: path is None)
    from_plugin = _when(*sources, holds=lambda path, embedded, plugin: path is None and embedded is None and plugin is not None)
    from_hub = _when(*sources, holds=lambda *names: set(names) == {None})
    separator = {f"{group}.separator": Effect(modes, _when(kind, holds=lambda kind: kind == "language"), **common)}
    common |= {"recorded_as": recorded_as}
    effects = {
        "path": Effect(modes, place="text", **common),
        "embedded": Effect(modes, unset, place="embedded", **common),
        "plugin": Effect(modes, from_plugin, **common),
        "field": Effect(modes, _when(*sources, holds=_has_fields), **common),
        "rows": Effect(modes, _when(kind, *place, holds=lambda kind, *p: kind == "diffusion" or _has_documents(*p)), **common),
    }
    effects |= {name: Effect(modes, from_hub, **common) for name in ("dataset", "subset", "data_files", "revision", "split")}
    return separator | {f"{group}.{name}": effect for name, effect in effects.items()}


DIVERGENCES = ("kl_divergence", "top1_agreement")
PERPLEXITY = ("perplexity.*", *(f"{name}.*" for name in DIVERGENCES))
ZERO_SHOT, SPEED, IMAGES = ("zero_shot",), ("speed",), ("images",)
SPARSITY_ALONE = ("sparsity",)  # of a dense model: the fraction of zeros in the selected layers

EFFECTS: dict[str, Effect] = {
    "model.kind": Effect(EVERYTHING, moments=True),
    "model.embedded": Effect(EVERYTHING, MODEL_EMBEDDED, place="embedded", recorded_as="protocol.model.sha256", moments=True),
    "model.built": Effect(DIFFUSION),
    "model.path": Effect(EVERYTHING, place="model", recorded_as="protocol.model.sha256", moments=True),
    "model.revision": Effect(EVERYTHING, MODEL_ON_HUB, moments=True),
    "model.variant": Effect(DIFFUSION, _when("model.variant")),
    "model.omit": Effect(DIFFUSION, _when("model.omit"), unordered=True),
    "model.dtype": Effect(EVERYTHING, moments=True),
    "model.blocks": Effect(LANGUAGE, of_dense=SPARSITY_ALONE, moments=True),
    "model.bos": Effect(LANGUAGE, moments=True),
    "model.trust_remote_code": Effect(LANGUAGE, MODEL_BY_PATH, moments=True),
    "sparsity.pattern": Effect(PRUNED),
    "sparsity.ratio": Effect(PRUNED, SHARES),
    "sparsity.heads": Effect(PRUNED, STRUCTURED, moments=True),  # structured sparsity reads the inputs of other layers
    "sparsity.neurons": Effect(PRUNED, STRUCTURED, moments=True),
    "sparsity.saliency": Effect(PRUNED, HEADS_BY_OBS, role="row"),  # a neuron has one column
    "sparsity.at_once": Effect(PRUNED, NEURONS_BY_OBS, role="row"),  # heads are removed one by one
    "allocation": Effect(PRUNED_LANGUAGE, ALLOCATED, role="row"),
    "allocation.rule": Effect(PRUNED_LANGUAGE, role="row"),
    "allocation.outlier": Effect(PRUNED_LANGUAGE, BY_OUTLIERS, role="row"),
    "method.name": Effect(EVERYTHING, role="row"),
    "method.options": Effect(PRUNED, role="row"),
    "method.layer_options": Effect(PRUNED, role="row", ordered=True),  # the first pattern that matches counts
    "reorder": Effect(PRUNED, ORDERED, role="row"),
    "reorder.columns": Effect(PRUNED, role="row"),
    "reorder.blocks": Effect(PRUNED, role="row"),
    **_source("calibration", PRUNED, "protocol.calibration.sha256", moments=True),
    "calibration.samples": Effect(PRUNED, moments=True),
    "calibration.window": Effect(PRUNED_LANGUAGE, moments=True),
    "calibration.draw": Effect(PRUNED, moments=True),
    "calibration.replicate": Effect(PRUNED_LANGUAGE, role="replicate", moments=True),
    **_source("evaluation.perplexity.*", LANGUAGE, "protocol.evaluation.sha256", metrics=PERPLEXITY),
    "evaluation.perplexity.*.window": Effect(LANGUAGE, metrics=PERPLEXITY),
    "evaluation.perplexity.*.windows": Effect(LANGUAGE, metrics=PERPLEXITY),
    "evaluation.zero_shot.tasks": Effect(LANGUAGE, metrics=ZERO_SHOT),  # lm-eval batches the requests of all tasks
    "evaluation.zero_shot.few_shot": Effect(LANGUAGE, TASKS_MEASURED, metrics=ZERO_SHOT),
    "evaluation.zero_shot.limit": Effect(LANGUAGE, TASKS_MEASURED, metrics=ZERO_SHOT),
    "evaluation.zero_shot.batch": Effect(LANGUAGE, TASKS_MEASURED, metrics=ZERO_SHOT),
    "evaluation.zero_shot.include_path": Effect(
        LANGUAGE, TASKS_MEASURED, metrics=ZERO_SHOT, place="files", recorded_as="protocol.zero_shot.include_sha256"
    ),
    "evaluation.zero_shot.data": Effect(LANGUAGE, ROWS_FROM_WHEEL_OR_HUB, metrics=ZERO_SHOT),
    "evaluation.zero_shot.data_dir": Effect(
        LANGUAGE, TASKS_MEASURED, metrics=ZERO_SHOT, place="files", recorded_as="protocol.zero_shot.data"
    ),
    "evaluation.speed": Effect(PRUNED_LANGUAGE, TIMED, metrics=SPEED),
    **_source("evaluation.images", DIFFUSION, "protocol.images.sha256", metrics=IMAGES),
    "evaluation.images.samples": Effect(DIFFUSION, metrics=IMAGES),
    "evaluation.images.metrics": Effect(DIFFUSION, metrics=(), unordered=True),
    "evaluation.images.clip": Effect(
        DIFFUSION, SCORED_BY_CLIP, metrics=("images.clip_score",), place="files", recorded_as="protocol.images.clip"
    ),
    "evaluation.images.reference": Effect(
        DIFFUSION, COMPARED_TO_REAL, metrics=("images.fid",), place="files", recorded_as="protocol.images.reference"
    ),
    "evaluation.images.sheet": Effect(NOTHING),
    "evaluation.divergence": Effect(PRUNED_LANGUAGE, PERPLEXITY_MEASURED, metrics=()),
    "evaluation.batch": Effect(LANGUAGE, PERPLEXITY_MEASURED, metrics=("perplexity", *DIVERGENCES)),
    "evaluation.limit": Effect(EVERYTHING, MEASURED, metrics=("perplexity", *DIVERGENCES, *ZERO_SHOT, *IMAGES)),
    "engine": Effect(PRUNED),
    "engine.precision": Effect(PRUNED, moments=True),
    "refine": Effect(PRUNED, REFINED, role="row"),
    "refine.steps": Effect(PRUNED, role="row"),
    "refine.tolerance": Effect(PRUNED, FITTED, role="row"),
    "refine.mask_iterations": Effect(PRUNED, role="row"),
    "refine.penalty": Effect(PRUNED, MASKS_CHOSEN, role="row"),
    "refine.growth": Effect(PRUNED, MASKS_CHOSEN, role="row"),
    "refine.every": Effect(PRUNED, MASKS_CHOSEN, role="row"),
    "refine.relaxation": Effect(PRUNED, MASKS_CHOSEN, role="row"),
    "target": Effect(PRUNED_LANGUAGE, TARGETED, role="row"),
    "target.strength": Effect(PRUNED_LANGUAGE, role="row"),
    "target.residual": Effect(PRUNED_LANGUAGE, role="row"),
    "reconstruction": Effect(PRUNED, RECONSTRUCTED, role="row"),
    "reconstruction.epochs": Effect(PRUNED, role="row"),
    "pipeline.layers": Effect(EVERYTHING, of_dense=SPARSITY_ALONE, moments=True, unordered=True),
    "pipeline.skip": Effect(EVERYTHING, of_dense=SPARSITY_ALONE, moments=True, unordered=True),
    "pipeline.true_sequential": Effect(PRUNED_LANGUAGE, moments=True),
    "pipeline.permute": Effect(PRUNED_LANGUAGE, GROUPS_OF_WEIGHTS, role="row"),
    "pipeline.batch": Effect(PRUNED_LANGUAGE, moments=True),  # changes rounding on a GPU, as the other batches do
    "pipeline.activations": Effect(NOTHING),
    "pipeline.weights": Effect(NOTHING),
    "pipeline.by_blocks": Effect(NOTHING),
    "pipeline.resume": Effect(NOTHING),
    "pipeline.expert_tokens": Effect(PRUNED_LANGUAGE),
    "pipeline.starved_experts": Effect(PRUNED_LANGUAGE),
    "diffusion.steps": Effect(DIFFUSION, SAMPLED, of_dense=IMAGES),
    "diffusion.guidance": Effect(DIFFUSION, SAMPLED, of_dense=IMAGES),
    "diffusion.height": Effect(DIFFUSION, SAMPLED, of_dense=IMAGES),
    "diffusion.width": Effect(DIFFUSION, SAMPLED, of_dense=IMAGES),
    "diffusion.text_length": Effect(DIFFUSION, SAMPLED, of_dense=IMAGES),
    "diffusion.batch": Effect(DIFFUSION, SAMPLED, of_dense=IMAGES),
    "diffusion.scheduler": Effect(DIFFUSION, SAMPLED, of_dense=IMAGES),
    "diffusion.packages": Effect(PRUNED_DIFFUSION),
    "diffusion.weighting": Effect(PRUNED_DIFFUSION),
    "diffusion.alpha_min": Effect(PRUNED_DIFFUSION, WEIGHTED),
    "diffusion.alpha_max": Effect(PRUNED_DIFFUSION, WEIGHTED),
    "diffusion.convolutions": Effect(DIFFUSION, of_dense=SPARSITY_ALONE),
    "seed": Effect(PRUNED, role="seed", moments=True),
    "tracking": Effect(NOTHING),
    "figures": Effect(NOTHING),
    "device": Effect(NOTHING),
    "save": Effect(NOTHING),
    "sparsity_config": Effect(NOTHING),
    "preflight": Effect(NOTHING),
    "tags": Effect(NOTHING),
    "plan": Effect(NOTHING),
    "rerun": Effect(NOTHING),
}
"""The effect of each setting. An entry covers a setting and all settings below it that have no entry of their own. A ``*``
stands for a name that the user chooses. An option class of the engine has an entry for the whole group, so that a new option
counts wherever the group acts."""


def without_effect() -> list[str]:
    """Return the settings, or groups of settings, that cannot change a result."""
    return [name for name, effect in EFFECTS.items() if effect.modes == NOTHING]


def effect_of(name: str) -> Effect:
    """Return the nearest entry of :data:`EFFECTS` that covers a setting. In ``name``, ``*`` replaces names that the user chose.

    Raises:
        LookupError: no entry covers it.
    """
    entry = name
    while entry not in EFFECTS:
        entry = entry.rpartition(".")[0]
        if not entry:
            raise LookupError(f"EFFECTS: expected an entry for {name}, got none")
    return EFFECTS[entry]
