"""Figures that papers have published, from data files with their source and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

FIGURES = ("rose",)  # files of the folder published/


@dataclass(frozen=True)
class Published:
    """One published value beside ours.

    Attributes:
        trust: primary, secondary or digitised.
        deviation: of ours: relative, or for accuracies in points.
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
def _index() -> dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Every figure by model, method, sparsity and metric, with its table and its paper."""
    return {
        (f.get("model"), f.get("method"), f.get("sparsity"), f["metric"]): (f, table, paper)
        for paper in papers()
        for table in paper["tables"].values()
        for f in table["figures"]
    }


def find(config: Mapping[str, Any], label: str, sparsity: str, metric: str, value: float) -> Published | None:
    """What a paper says of the run with this configuration, compared with our ``value``.

    Args:
        label: the method as the literature calls it.
        sparsity: ``dense``, a ratio such as ``0.7``, or a pattern such as ``2:4``.
    """
    for paper in papers():
        model = paper["models"].get(config["model"]["path"])
        found = _index().get((model, label, sparsity, metric)) or _index().get((model, label, None, metric))
        options = paper["methods"].get(label, {})
        if model is None or found is None or any(config["method"]["options"].get(k) != v for k, v in options.items()):
            continue
        figure, table, _ = found
        points = metric.startswith("zero_shot.")
        tolerance = table.get("tolerance_points" if points else "tolerance")
        deviation = value - figure["value"] if points else value / figure["value"] - 1
        why_not = "the tolerance is not known" if tolerance is None else _other_protocol(paper["protocol"], config)
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
    """Which settings of a paper's protocol a run has otherwise, if any. Of a dense model only those of the evaluation count."""
    dense = config["method"]["name"] == "dense"
    wanted = {name: value for name, value in protocol.items() if not dense or name.startswith("evaluation.")}
    own = {name: _get(config, name) for name in wanted}
    differing = [f"{name} {own[name]}, the paper's {value}" for name, value in wanted.items() if own[name] not in (value, ...)]
    return "; ".join(differing) or None


def _get(config: Mapping[str, Any], name: str) -> Any:
    """A setting by its dotted name, ``...`` where the run has none of that kind."""
    for part in name.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return ...
        config = config[part]
    return config
