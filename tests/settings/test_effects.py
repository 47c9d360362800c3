"""The table of effects is complete, correct and used everywhere. Cases are generated from the leaves of the settings."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rose_exp.cli.command import check_command
from rose_exp.engine import InputMoments
from rose_exp.engine.groups import GroupedLayer, prune_groups
from rose_exp.models import linear_layers
from rose_exp.report.conditions import SPARSITY, column_of, conditions, variant
from rose_exp.runs.identity import identifying, run_id
from rose_exp.runs.preparation import first_key, pruning_plan
from rose_exp.settings.effective import acting, complete, effective, settings_of, within
from rose_exp.settings.effects import EFFECTS, effect_of
from rose_exp.settings.schema import Settings

from .effects_cases import LEAVES, at, bases_in, cases, changed, metrics_of, moved, recorded, view
from .effects_modes import (
    DENSE,
    LANGUAGE,
    MATTERS,
    MODES,
    MOMENTS,
    NEVER,
    NOWHERE,
    PLACES,
    PRUNED,
    PRUNED_LANGUAGE,
    ROWS,
    STRUCTURED,
    concerns,
)

# Groups whose entries also cover new options.
OPTION_CLASSES = ("engine", "refine", "target", "allocation", "reorder", "reconstruction")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def bases(files) -> dict[str, dict[str, Any]]:
    """Return a configuration of each mode."""
    return bases_in(files)


def test_every_leaf_has_one_entry_and_every_entry_has_a_leaf():
    for name in LEAVES:
        assert any(within(name, entry) for entry in EFFECTS), name
    for entry in EFFECTS:
        own = [name for name in LEAVES if within(name, entry)]
        assert own, f"{entry} is not a setting"
        if entry in OPTION_CLASSES:
            continue
        assert all(effect_of(name) is EFFECTS[entry] for name in own), f"{entry} overlaps with another entry"


def test_expected_effects_cover_every_leaf():
    never = {name for name in LEAVES if any(within(name, entry) for entry in NEVER)}
    assert set(MATTERS) | never == set(LEAVES)
    assert not set(MATTERS) & never


@pytest.mark.parametrize("mode", MODES)
def test_run_id_changes_exactly_when_the_report_changes(bases, files, mode):
    """A setting is also a condition of each metric that it can change, unless rows compare it or tables average over it."""
    base = bases[mode]
    identity, seen = run_id(Settings(**base)), view(base)
    for name, known, other in cases(base, files):
        matters = mode in MATTERS.get(known, NOWHERE)
        found = view(other)
        assert (run_id(Settings(**other)) != identity) == matters, f"{name} and the run ID"
        assert (found != seen) == matters, f"{name} and the report"
        if known in ("model.kind", "method.name", "sparsity.pattern"):  # these change which other settings have an effect
            continue
        of_row = known in ("seed", "calibration.replicate") or any(within(known, row) for row in ROWS)
        for metric in set(metrics_of(base)) & set(metrics_of(other)):
            expected = matters and not of_row and concerns(known, metric, mode in DENSE)
            assert (found[metric] != seen[metric]) == expected, f"{name} and {metric}"


def test_rows_compare_the_expected_settings():
    roles = {name: effect_of(name).role for name in LEAVES}
    assert {name for name, role in roles.items() if role == "row"} == {
        name for name in LEAVES if any(within(name, row) for row in ROWS)
    }
    assert [name for name, role in roles.items() if role == "seed"] == ["seed"]
    assert [name for name, role in roles.items() if role == "replicate"] == ["calibration.replicate"]


@pytest.mark.parametrize("mode", MODES)
def test_effective_settings_of_a_metric_are_those_that_can_change_it(bases, mode):
    everything = effective(bases[mode])
    for metric in metrics_of(bases[mode]):
        expected = {name for name in everything if concerns(name.replace(".local.", ".*."), metric, mode in DENSE)}
        assert set(effective(bases[mode], metric)) == expected, metric


@pytest.mark.parametrize("mode", MODES)
def test_sparsity_in_the_columns_is_not_a_condition(bases, mode):
    for metric in metrics_of(bases[mode]):
        found, expected = (conditions(recorded(bases[mode]), metric, columns) for columns in (SPARSITY, "seed"))
        assert found == {name: value for name, value in expected.items() if not within(name, SPARSITY)}


def test_setting_without_an_entry_raises_an_error(bases, monkeypatch):
    whole = changed(bases["n:m"], "evaluation.images", bases["images"]["evaluation"]["images"])
    whole = changed(whole, "tracking.wandb", {})
    effective(whole)
    for name in [name for name in EFFECTS if not any(within(name, group) for group in OPTION_CLASSES)]:
        with monkeypatch.context() as patch:
            patch.delitem(EFFECTS, name)
            with pytest.raises(LookupError, match="EFFECTS: expected an entry for"):
                effective(whole)


@pytest.mark.parametrize("mode", MODES)
def test_moving_files_changes_neither_run_id_nor_report(bases, mode, tmp_path):
    elsewhere = moved(bases[mode], tmp_path)
    assert run_id(Settings(**elsewhere)) == run_id(Settings(**bases[mode]))
    assert view(elsewhere) == view(bases[mode])


@pytest.mark.parametrize(
    "mode", ["unstructured", "embedded", "hub", "dense embedded", "images", "images of rows", "images of hub"]
)
def test_texts_with_a_fingerprint_are_not_identified_by_location(bases, mode):
    """Applies to reports, and to run IDs where the content is known before the run."""
    groups = ("calibration", "evaluation.perplexity.local", "evaluation.images")
    places = {f"{group}.{name}" for group in groups for name in PLACES}
    places |= {"model.embedded"} | (set() if "hub" in mode else {"model.path"})  # content unknown
    for metric in metrics_of(bases[mode]):
        found = conditions(recorded(bases[mode]), metric, SPARSITY)
        assert not places & {name for name, value in found.items() if value is not None}
    counted = identifying(Settings(**bases[mode]))
    for name in ("model.embedded", *(f"{group}.embedded" for group in groups)):
        assert counted.get(name) is None or len(counted[name]) == 64


@pytest.mark.parametrize("mode", sorted(PRUNED))
def test_rows_of_a_table_have_equal_conditions(bases, files, mode):
    base = bases[mode]
    rows = {s.name for s in settings_of(base) if s.effect.role == "row"}
    for name, _, other in cases(base, files):
        if name not in rows or other["method"]["name"] == "dense":
            continue
        for metric in metrics_of(base):
            assert conditions(recorded(other), metric, SPARSITY) == conditions(recorded(base), metric, SPARSITY), name


def test_option_in_effect_in_some_columns_is_a_condition_of_all(bases):
    other = bases["images uniform"]
    found = [conditions(recorded(c), "images.distance", "diffusion.weighting") for c in (bases["images"], other)]
    assert found[0] == found[1]
    narrower = changed(other, "diffusion.alpha_min", 0.9)
    assert conditions(recorded(narrower), "images.distance", "diffusion.weighting") != found[0]


@pytest.mark.parametrize("mode", sorted(PRUNED_LANGUAGE))
def test_key_of_the_first_block_changes_only_with_its_moments(bases, files, mode):
    base = bases[mode]
    key = first_key(Settings(**base), {})
    for name, known, other in cases(base, files):
        if known == "model.kind":
            continue
        expected = mode in MATTERS.get(known, NOWHERE) and any(within(known, group) for group in MOMENTS)
        expected |= known == "sparsity.pattern" and mode in STRUCTURED  # heads and neurons no longer have an effect
        assert (first_key(Settings(**other), {}) != key) == expected, name


@pytest.mark.parametrize("mode", MODES)
def test_options_in_effect_are_those_that_settings_build(bases, mode):
    settings, pruned = Settings(**bases[mode]), mode in PRUNED
    language = mode in LANGUAGE  # a diffusion model has neither allocation nor target
    built = {
        "order": bool(settings.reorder),
        "allocation": language and bool(settings.allocation),
        "target": language and bool(settings.target),
        "refinement": bool(settings.refine),
        "reconstruction": bool(settings.reconstruction),
    }
    assert acting(bases[mode]) == {name for name, is_built in built.items() if is_built and pruned}
    permuted = changed(bases[mode], "pipeline.permute", True)
    plan = pruning_plan(Settings(**permuted)) if pruned and mode in LANGUAGE else None
    assert ("permutation" in acting(permuted)) == bool(plan and plan.permutes)


@pytest.mark.parametrize("mode", ["unstructured", "ordered", "n:m", "4:8", "wanda", "least squares", "masks"])
def test_options_without_effect_give_bitwise_equal_weights(bases, files, mode):
    """The engine confirms which options have no effect."""
    base = bases[mode]
    expected = solved(base)
    tried = 0
    for name, known, other in cases(base, files):
        if known.split(".")[0] in ("reorder", "refine", "engine", "sparsity") and mode not in MATTERS[known]:
            assert torch.equal(solved(other), expected), name
            tried += 1
    assert tried > 4


def solved(config: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    block = nn.ModuleDict({"layer": nn.Linear(48, 24, bias=False)})
    block["layer"].weight.data = torch.randn(24, 48, generator=generator)
    inputs = torch.randn(200, 48, generator=generator) * torch.linspace(0.1, 3, 48)
    moments = InputMoments(48)
    moments.update(inputs)
    pruning_plan(Settings(**config)).solve(linear_layers(block, "block"), moments)
    return block["layer"].weight.data


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("width", [1, 8])
def test_options_with_an_effect_on_structured_pruning(method, width):
    """A neuron has one column, a head several; heads are removed one at a time."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    moments = InputMoments(64)
    moments.update(torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    layer = GroupedLayer(weight, moments, torch.arange(64).view(-1, width))
    found = {
        (saliency, at_once): prune_groups([layer], 3, method=method, saliency=saliency, at_once=at_once).weights[0]
        for saliency, at_once in itertools.product(("diagonal", "exact"), (1, 3))
    }
    by_obs = method == "sparsegpt"
    assert torch.equal(found["diagonal", 1], found["exact", 1]) == (not by_obs or width == 1)
    assert by_obs or torch.equal(found["diagonal", 1], found["diagonal", 3])


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("sparsity.ratio", 1, 1.0),
        ("sparsity.ratio", "0.5", 0.5),
        ("reorder.threshold", 0, 0.0),
        ("calibration.samples", 4.0, 4),
        ("calibration.samples", "4", 4),
        ("pipeline.true_sequential", "false", False),
        ("sparsity.heads", 1, True),
        ("pipeline.layers", ("*.0.*",), ["*.0.*"]),
        ("pipeline.layers", ["a", "b"], ["b", "a"]),
        ("method.options", {"a": 1, "b": 2.0}, {"b": 2, "a": 1.0}),
        ("method.options", {"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}),
        ("evaluation.speed", None, ...),
        ("evaluation.limit", None, ...),
        ("evaluation.zero_shot", None, ...),
        ("diffusion", None, ...),
        ("target", {"strength": 0.5}, {"strength": 0.5, "residual": 0.0, "damping": 0.1}),
    ],
)
def test_equal_settings_have_equal_effects(bases, name, first, second):
    """Covers values as text or integers, in another order, or left at their defaults (``...``)."""
    base = changed(bases["ordered"], "evaluation.zero_shot.tasks", [])
    one, other = changed(base, name, first), changed(base, name, second)
    if second is ...:
        group, _, last = name.rpartition(".")
        del (at(other, group) if group else other)[last]
    assert json.dumps(effective(one), sort_keys=True) == json.dumps(effective(other), sort_keys=True)
    assert complete(one) == complete(other)
    assert json.dumps(view_of(one)) == json.dumps(view_of(other))


def view_of(config: dict[str, Any]) -> list[Any]:
    record = {"config": config, "protocol": {"evaluation": {"local": {}}}}
    return [conditions(record, "perplexity.local", SPARSITY), variant(record), column_of(record, SPARSITY)]


@pytest.mark.parametrize(
    "command", ["", "method=rose_plus sparsity=2:4", "model=small-sd3 method=dsnot", "evaluation=[c4,zero_shot,speed]"]
)
def test_configuration_and_its_settings_have_equal_effects(command):
    """Records store the configuration, but run IDs are computed from the settings."""
    job = check_command(command.split()).jobs[0]
    assert effective(job.config) == effective(job.settings.model_dump(mode="json"))
    assert complete(job.config) == complete(job.settings.model_dump(mode="json"))


def test_order_of_image_metrics_has_no_effect(bases):
    orders = (["clip_score", "fid"], ["fid", "clip_score"])
    one, other = (effective(changed(bases["images scored"], "evaluation.images.metrics", order)) for order in orders)
    assert one == other


def test_order_of_layer_options_has_an_effect(bases):
    options = {"*mlp*": {"a": 1}, "*down*": {"a": 2}}
    one, other = (
        changed(bases["unstructured"], "method.layer_options", dict(order))
        for order in (options.items(), reversed(options.items()))
    )
    assert effective(one) != effective(other)
    assert variant(recorded(one)) != variant(recorded(other))
    assert run_id(Settings(**one)) != run_id(Settings(**other))


def test_different_ratios_have_different_columns(bases):
    ratios = (0.5, 0.50001, 0.5000001, 0.7)
    assert len({column_of(recorded(changed(bases["unstructured"], "sparsity.ratio", r)), SPARSITY) for r in ratios}) == 4


def test_unknown_setting_in_a_record_is_a_condition(bases):
    record = recorded(bases["unstructured"] | {"of_another_version": {"option": 1}, "hydra": {"job": {}}})
    found = conditions(record, "perplexity.local", SPARSITY)
    assert found["of_another_version.option"] == 1
    assert not any(within(name, "hydra") for name in found)


def test_files_are_identified_by_their_content_and_format(bases, tmp_path):
    base = bases["unstructured"]
    for name in ("x.jsonl", "y.jsonl", "z.txt"):
        (tmp_path / name).write_text('{"text": "equal"}')
    x, y, z = (Settings(**changed(base, "calibration.path", str(tmp_path / name))) for name in ("x.jsonl", "y.jsonl", "z.txt"))
    assert run_id(x) == run_id(y) != run_id(z)
    assert str(tmp_path) not in json.dumps(identifying(x))
