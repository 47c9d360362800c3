"""Conditions that numbers in one table share: everything they depend on except what the table compares.

:mod:`rose_exp.settings.effects` decides which settings a number depends on. The record's protocol adds what settings do not
contain: fingerprints of texts and weights, versions and hardware.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..settings.effective import Setting, complete, settings_of, within, without
from ..settings.effects import DIVERGENCES
from ..settings.leaves import flat
from ..settings.plugins import DATASETS_GROUP

OF_SEED = (
    "protocol.seed",
    "protocol.calibration.seed",
    "protocol.calibration.tokens_sha256",
    "protocol.calibration.noise_sha256",
)
FACTS_OF = {  # facts of the protocol that apply only if a setting acts
    "protocol.calibration": "calibration",
    "protocol.backend": "engine.backend",
    "protocol.images.clip": "evaluation.images.clip",
    "protocol.images.reference": "evaluation.images.reference",
}
FOLLOWING = {  # facts of the protocol that change with a setting; the longest name that contains a setting applies
    "calibration": "protocol.calibration",
    "calibration.samples": "protocol.calibration.windows",
    "calibration.window": "protocol.calibration.window",
    "diffusion.scheduler": "protocol.model.scheduler",
    "engine.backend": "protocol.backend",
    "evaluation.images": "protocol.images",
    "evaluation.perplexity": "protocol.evaluation",
    "evaluation.speed": "protocol.speed",
    "evaluation.zero_shot": "protocol.zero_shot",
    "model": "protocol.model",
    "model.dtype": "protocol.model.dtype",
}
PROMPTS = ("protocol.calibration.prompts", "protocol.calibration.sha256")  # number and fingerprint of the prompts in use
PLUGINS = "protocol.plugins"  # code of other packages; that of methods and scores identifies a row
SPARSITY = "sparsity"
EVALUATED = ("evaluation", "images", "zero_shot", "speed")  # parts of the protocol that belong to metrics of one kind


def conditions(record: Mapping[str, Any], metric: str, columns: str) -> dict[str, Any]:
    """Return everything that a metric depends on except the seed, the setting ``columns`` and what rows compare."""
    settings = settings_of(record["config"], metric, assumed=columns)
    facts = {name: value for name, value in _facts(record["protocol"], metric).items() if _covered(name, settings)}
    if columns == "calibration.samples" and PROMPTS[0] in facts:  # settings identify the list that the prompts are from
        facts = without(facts, PROMPTS)
    setting_values = {s.name: s.value for s in settings if s.effect.role == "condition" and not _recorded(s, facts)}
    sources = [name for name in facts if name.endswith(".source") and f"{name.rpartition('.')[0]}.sha256" in facts]
    following = max((name for name in FOLLOWING if within(columns, name)), key=len, default=None)
    facts = without(facts, [FOLLOWING[following]] if following else [])
    return without(setting_values | facts, [*sources, *OF_SEED, PLUGINS, columns])


def _facts(protocol: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return the facts of the protocol that concern a metric, by dotted name."""
    facts = flat({name: value for name, value in protocol.items() if name not in EVALUATED}, "protocol.")
    kind, _, name = metric.partition(".")
    metric_facts: Mapping[str, Any] = protocol.get(kind) or {}
    if kind in ("perplexity", *DIVERGENCES):
        kind, metric_facts = "evaluation", protocol["evaluation"][name]
    if kind == "zero_shot":
        metric_facts = {name: value for name, value in metric_facts.items() if name != "results"}  # a file name
    return facts | (flat(metric_facts, f"protocol.{kind}.") if kind in EVALUATED else {})


def _covered(fact: str, settings: Sequence[Setting]) -> bool:
    """Return whether a fact of the protocol belongs to a setting that acts, or to no setting."""
    setting_names = [setting for group, setting in FACTS_OF.items() if within(fact, group)]
    return all(any(within(setting.name, name) for setting in settings) for name in setting_names)


def _recorded(setting: Setting, facts: Mapping[str, Any]) -> bool:
    """Return whether the protocol contains the fingerprint of what a setting selects."""
    place = setting.effect.recorded_as
    return place is not None and any(within(name, place) and value not in (None, {}) for name, value in facts.items())


def variant(record: Mapping[str, Any], columns: str | None = None) -> dict[str, Any]:
    """Return what identifies a row of a table: the method and all options that act, by dotted name.

    Args:
        columns: the setting in the columns, which identifies no row. Columns of sparsity show pattern, ratio and what is
            removed, but not the options of structured sparsity.
    """
    settings = settings_of(record["config"], assumed=columns or "")
    values = {s.name: s.value for s in settings if s.effect.role == "row" or s.name == "model.kind"}
    plugins = record["protocol"].get("plugins") or {}
    values |= flat({group: used for group, used in plugins.items() if group != DATASETS_GROUP}, f"{PLUGINS}.")
    return values if columns in (None, SPARSITY) else without(values, [columns])


def depends(record: Mapping[str, Any], metric: str, columns: str) -> bool:
    """Return whether a metric of the run depends on the setting ``columns``.

    That of a dense model depends on the number of denoising steps, for example, but not on the sparsity.
    """
    return any(within(setting.name, columns) for setting in settings_of(record["config"], metric))


def is_dense(record: Mapping[str, Any]) -> bool:
    """Return whether the run measured a dense model."""
    return record["config"]["method"]["name"] == "dense"


def agree(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two sets of conditions have equal values for all common names."""
    return all(second[name] == value for name, value in first.items() if name in second)


def differing(condition_sets: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the names with differing values, each with the value in every set; ``None`` for a set without the name."""
    names: Iterable[str] = dict.fromkeys(name for conditions in condition_sets for name in conditions)
    values = {name: [conditions.get(name) for conditions in condition_sets] for name in names}
    return {
        name: setting_values
        for name, setting_values in values.items()
        if any(value != setting_values[0] for value in setting_values)
    }


def column_of(record: Mapping[str, Any], columns: str) -> str:
    """Return the column that a run belongs to: the value of a setting, or the sparsity."""
    values = complete(record["config"])
    if columns == SPARSITY:
        pattern = values["sparsity.pattern"]
        if pattern == "structured":
            kinds = [kind for kind in ("heads", "neurons") if values[f"sparsity.{kind}"]]
            return f"structured {kinds[0] + ' ' if len(kinds) == 1 else ''}{_short(values['sparsity.ratio'])}"
        return pattern if values.get("sparsity.ratio") is None or ":" in pattern else _short(values["sparsity.ratio"])
    if columns in values:
        return str(values[columns])
    parts = {name.removeprefix(f"{columns}."): value for name, value in values.items() if within(name, columns)}
    return ", ".join(f"{name}={value}" for name, value in parts.items()) or "None"


def _short(number: float) -> str:
    """Format a number with six significant digits, or more if needed to represent it exactly."""
    return text if float(text := f"{number:g}") == number else repr(number)
