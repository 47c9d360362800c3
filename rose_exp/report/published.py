"""Figures that papers have published, from data files with their source and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from ..settings.effects import flat
from .conditions import SPARSITY, column_of, is_dense

POINTS = ("zero_shot", "images.clip_score", "images.image_reward")  # compared by difference, as a ratio says nothing of them
# of a protocol, what the figures of a dense model hang on
OF_DENSE = ("evaluation.", *(f"diffusion.{name}" for name in ("steps", "guidance", "height", "width", "scheduler")))
FIGURES = ("rose", "obs_diff")  # files of the folder published/


@dataclass(frozen=True)
class Published:
    """One published value beside ours.

    Attributes:
        trust: primary, secondary or digitised.
        deviation: of ours: relative, or for accuracies and scores in points.
        within: whether that is inside the tolerance; None where it is not judged.
        why_not: why it is not judged.
    """

    value: float
    source: str
    trust: str
    deviation: float
    within: bool | None
    why_not: str | None


@cache
def papers() -> list[dict[str, Any]]:
    folder = resources.files(__package__) / "published"
    return [yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) for name in FIGURES]


@cache
def _index() -> dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """The figures of every model, method, sparsity and metric, each with its table."""
    found: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for paper in papers():
        for table in paper["tables"].values():
            for f in table["figures"]:
                key = (f.get("model"), f.get("method"), f.get("sparsity"), f["metric"])
                found.setdefault(key, []).append((f, table))
    return found


def _fitting(key: tuple[Any, ...], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The figure whose table is about the settings that a run has, if any: one that names more of them comes first."""
    there = sorted(_index().get(key, []), key=lambda item: -len(item[0].get("with", {})))
    return next((item for item in there if all(values.get(k) == v for k, v in item[0].get("with", {}).items())), None)


def find(runs: Sequence[Mapping[str, Any]], metric: str, value: float) -> Published | None:
    """What a paper says of these runs, which differ in their seed alone, compared with ``value``, their mean."""
    config, label = runs[0]["config"], runs[0]["label"]
    sparsity = "dense" if is_dense(runs[0]) else column_of(runs[0], SPARSITY)
    for paper in papers():
        model = paper["models"].get(config["model"]["path"])
        values = flat(config)
        found = _fitting((model, label, sparsity, metric), values) or _fitting((model, label, None, metric), values)
        options = paper["methods"].get(label, {})
        if model is None or found is None or any(config["method"]["options"].get(k) != v for k, v in options.items()):
            continue
        figure, table = found
        protocol = paper["protocol"] | table.get("protocol", {}) | figure.get("with", {})
        points = metric.startswith(POINTS)
        tolerance = table.get("tolerance_points" if points else "tolerance")
        deviation = value - figure["value"] if points else value / figure["value"] - 1
        unknown = "no tolerance is known for it" if tolerance is None else None
        why_not = "; ".join(reason for reason in (_other_protocol(protocol, config), unknown) if reason) or None
        return Published(
            value=figure["value"],
            source=figure.get("source", table["source"]),
            trust=figure.get("trust", table["trust"]),
            deviation=deviation,
            within=None if why_not else abs(deviation) <= tolerance,
            why_not=why_not,
        )
    return None


def _other_protocol(protocol: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Which settings of a paper's protocol a run has otherwise, if any. Of a dense model those of the evaluation count, and of
    a text that was not measured none."""
    values = flat(config)
    differing = []
    for name, value in protocol.items():
        if is_dense({"config": config}) and not name.startswith(OF_DENSE):
            continue
        if name.startswith("evaluation.perplexity.") and name.split(".")[2] not in config["evaluation"]["perplexity"]:
            continue
        own = values.get(name)
        if own != value:
            differing.append(f"{name} {own}, the paper's {value}")
    return "; ".join(differing) or None
