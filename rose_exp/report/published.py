"""Compare results with published figures, which are stored with their source and its reliability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from ..settings.leaves import flat
from .conditions import SPARSITY, column_of, is_dense

POINTS = ("zero_shot", "images.clip_score", "images.image_reward")  # compared by difference, because ratios are not meaningful
# settings of a protocol that the figures of a dense model depend on
OF_DENSE = ("evaluation.", *(f"diffusion.{name}" for name in ("steps", "guidance", "height", "width", "scheduler")))
FIGURES = ("rose", "obs_diff")  # files in published/


@dataclass(frozen=True)
class Published:
    """A published value, compared with ours.

    Attributes:
        trust: primary, secondary or digitised.
        deviation: deviation of our value, relative or, for accuracies and scores, in points.
        within: whether the deviation is within tolerance; None if not judged.
        why_not: reason for not judging.
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
    """Return the figures by model, method, sparsity and metric, each with its table."""
    figures: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for paper in papers():
        for table in paper["tables"].values():
            for f in table["figures"]:
                key = (f.get("model"), f.get("method"), f.get("sparsity"), f["metric"])
                figures.setdefault(key, []).append((f, table))
    return figures


def _matching(key: tuple[Any, ...], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the most specific figure whose ``with`` settings match ``values``, with its table; None if there is none."""
    candidates = sorted(_index().get(key, []), key=lambda item: -len(item[0].get("with", {})))
    return next((item for item in candidates if all(values.get(k) == v for k, v in item[0].get("with", {}).items())), None)


def find(runs: Sequence[Mapping[str, Any]], metric: str, value: float) -> Published | None:
    """Compare ``value``, the mean of runs that differ only in their seed, with the published value; None if there is none."""
    config, label = runs[0]["config"], runs[0]["label"]
    sparsity = "dense" if is_dense(runs[0]) else column_of(runs[0], SPARSITY)
    for paper in papers():
        model = paper["models"].get(config["model"]["path"])
        values = flat(config)
        match = _matching((model, label, sparsity, metric), values) or _matching((model, label, None, metric), values)
        options = paper["methods"].get(label, {})
        if model is None or match is None or any(config["method"]["options"].get(k) != v for k, v in options.items()):
            continue
        figure, table = match
        protocol = paper["protocol"] | table.get("protocol", {}) | figure.get("with", {})
        points = metric.startswith(POINTS)
        tolerance = table.get("tolerance_points" if points else "tolerance")
        deviation = value - figure["value"] if points else value / figure["value"] - 1
        unknown = "no tolerance is known" if tolerance is None else None
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
    """Return the settings in which a run differs from a paper's protocol; None if there are none.

    For a dense model, only settings of evaluation and sampling count. Settings of texts that were not measured do not count.
    """
    values = flat(config)
    differing = []
    for name, value in protocol.items():
        if is_dense({"config": config}) and not name.startswith(OF_DENSE):
            continue
        if name.startswith("evaluation.perplexity.") and name.split(".")[2] not in config["evaluation"]["perplexity"]:
            continue
        actual = values.get(name)
        if actual != value:
            differing.append(f"{name} is {actual}, in the paper {value}")
    return "; ".join(differing) or None
