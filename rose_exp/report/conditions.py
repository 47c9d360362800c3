"""What two numbers must share to stand in one table: everything that they hang on but what the table is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..dotted import flat, without

ROWS = (
    "method",
    "reorder",
    "refine",
    "target",
    "allocation",
    "engine.permute",
    "sparsity.saliency",
    "sparsity.at_once",
    "seed",
)  # what tables compare, or average over
WITHOUT_EFFECT = ("device", "tracking", "figures", "save", "tags", "plan", "rerun", "pipeline.activations", "evaluation")
OF_SEED = (
    "protocol.seed",
    "protocol.calibration.seed",
    "protocol.calibration.tokens_sha256",
    "protocol.calibration.noise_sha256",
)
OF_PRUNED = (
    "sparsity",
    "calibration",
    "engine",
    "pipeline",
    "protocol.calibration",
    "protocol.backend",
    "diffusion.packages",
    "diffusion.weighting",
    "diffusion.alpha_min",
    "diffusion.alpha_max",
)  # of no meaning for a dense model
PLACES = ("path", "embedded", "source")  # of what has a fingerprint of its own beside it
FOLLOWING = {  # what a setting brings with it in the protocol
    "calibration.samples": ("protocol.calibration.windows",),
    "calibration.window": ("protocol.calibration.window",),
    "model": ("protocol.model",),
}
SPARSITY = "sparsity"
EVALUATED = ("evaluation", "images", "zero_shot", "speed")  # parts of the protocol that belong to metrics of one kind


def conditions(record: Mapping[str, Any], metric: str, columns: str) -> dict[str, Any]:
    """Everything that a metric of a run hangs on but what rows stand for, the seed and the setting ``columns``."""
    config = {name: value for name, value in record["config"].items() if name != "hydra"}
    protocol = {name: value for name, value in record["protocol"].items() if name not in EVALUATED}
    found = flat(config) | flat(protocol, "protocol.")
    kind, _, name = metric.partition(".")
    if kind == "perplexity":
        own = {"evaluation": record["protocol"]["evaluation"][name], "batch": config["evaluation"].get("batch")}
        found |= flat(own, "protocol.")
    elif kind == "images":
        found |= flat(record["protocol"]["images"], "protocol.images.")
    elif kind == "zero_shot":
        found |= _zero_shot(record["protocol"].get("zero_shot", {}))
    else:
        found |= flat(record["protocol"].get("speed") or {}, "protocol.speed.")
    left_out = [*ROWS, *WITHOUT_EFFECT, *OF_SEED, columns, *FOLLOWING.get(columns, ())]
    if is_dense(record):
        left_out += OF_PRUNED
    kept = without(found, left_out)
    return {name: value for name, value in kept.items() if not _place(name, kept)}


def _zero_shot(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """How tasks were asked; the name of the file of results and the folder of the rows say nothing of it."""
    return flat({name: value for name, value in protocol.items() if name != "results"}, "protocol.zero_shot.")


def _place(name: str, among: Mapping[str, Any]) -> bool:
    """Whether this says where something lies whose fingerprint stands beside it."""
    parent, _, last = name.rpartition(".")
    if last not in PLACES:
        return False
    return f"{parent}.sha256" in among or f"protocol.{parent}.sha256" in among


def variant(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a table's row stands for: the method and all that is done beside it, as far as it has an effect."""
    config = record["config"]
    reorder, refine, target, allocation = (config.get(name, {}) for name in ("reorder", "refine", "target", "allocation"))
    permuted = config["engine"].get("permute", False) and config["sparsity"]["pattern"] != "unstructured"
    acts = {
        "reorder": {reorder["columns"], reorder["blocks"]} != {"none"},
        "refine": bool(refine.get("steps") or refine.get("mask_iterations")),
        "target": bool(target.get("strength") or target.get("residual")),
        "allocation": allocation.get("rule", "uniform") != "uniform",
    }
    kept = {name: config[name] if acting else "none" for name, acting in acts.items()}
    sparsity = config["sparsity"]
    structured = sparsity["pattern"] == "structured" and config["method"]["name"] == "sparsegpt"
    how = {name: sparsity[name] if structured else "none" for name in ("saliency", "at_once")}
    own = {"engine": {"permute": permuted}, "structured": how, "kind": config["model"].get("kind", "language")}
    return flat({"method": config["method"]} | kept | own)


def is_dense(record: Mapping[str, Any]) -> bool:
    return record["config"]["method"]["name"] == "dense"


def agree(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two sets of conditions have equal values for all that both know."""
    return all(second[name] == value for name, value in first.items() if name in second)


def differing(several: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Names that have not the same value everywhere, with the value in each; ``None`` where one has none."""
    names: Iterable[str] = dict.fromkeys(name for conditions in several for name in conditions)
    values = {name: [conditions.get(name) for conditions in several] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def column_of(record: Mapping[str, Any], columns: str) -> str:
    """The column that a run belongs to: its value of a setting, or its sparsity."""
    config = record["config"]
    if columns == SPARSITY:
        sparsity = config["sparsity"]
        if sparsity["pattern"] == "structured":
            kinds = [kind for kind in ("heads", "neurons") if sparsity.get(kind, True)]
            return f"structured {kinds[0] + ' ' if len(kinds) == 1 else ''}{sparsity['ratio']:g}"
        return sparsity["pattern"] if sparsity["ratio"] is None or ":" in sparsity["pattern"] else f"{sparsity['ratio']:g}"
    value: Any = config
    for part in columns.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return str(value)
