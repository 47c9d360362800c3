"""Published results: consistency of the data files and comparison with run results."""

from __future__ import annotations

import math

import pytest

from rose_exp.report.gather import gather
from rose_exp.report.published import find, papers
from rose_exp.settings.leaves import flat

from ..cli.test_command import settings_of
from .records import record

METRIC = "perplexity.wikitext2"
TRUST = {"primary", "secondary", "digitised"}
PAPER, OBS_DIFF = papers()


@pytest.mark.parametrize("paper", papers(), ids=lambda paper: paper["paper"][:4])
def test_published_results_are_complete_and_unique(paper):
    seen = set()
    for name, table in paper["tables"].items():
        assert {"title", "source", "trust"} <= set(table), name
        for figure in table["figures"]:
            assert math.isfinite(figure["value"])
            assert figure.get("trust", table["trust"]) in TRUST
            own = tuple(sorted(figure.get("with", {}).items()))
            key = (figure.get("model"), figure.get("method"), figure.get("sparsity"), figure["metric"], own)
            assert key not in seen, key
            seen.add(key)


def test_averages_of_table_3_are_the_means_of_its_tasks():
    rows = {}
    for figure in PAPER["tables"]["table3"]["figures"]:
        rows.setdefault((figure["model"], figure["method"]), {})[figure["metric"]] = figure["value"]
    assert len(rows) == 21
    for row in rows.values():
        tasks = [value for metric, value in row.items() if metric.startswith("zero_shot.") and not metric.endswith("average")]
        assert sum(tasks) / 7 == pytest.approx(row["zero_shot.average"], abs=0.006)


@pytest.mark.parametrize(
    ("paper", "overrides"),
    [
        (PAPER, ["model=llama2-7b", "calibration=c4", "evaluation=wikitext2"]),
        (OBS_DIFF, ["model=sd3-medium", "evaluation.images.samples=5000"]),
    ],
)
def test_models_and_protocols_refer_to_existing_settings(paper, overrides):
    paths = {settings_of(f"model={name}").model.path for name in paper["models"].values()}
    assert paths == set(paper["models"])
    config = settings_of(*overrides).model_dump()
    for name, value in paper["protocol"].items():
        place = config
        for part in name.split("."):
            place = place[part]
        assert place == value, name


def cell(label, perplexity, **options):
    (table,) = [t for t in gather([record(label, perplexity, **options)]).tables if t.metric == METRIC]
    return next(iter(table.cells[label].values())).published


def test_own_result_is_compared_within_the_tolerance():
    near = cell("SparseGPT", 27.2)
    assert (near.value, near.trust, near.within) == (27.68, "primary", True)
    assert near.deviation == pytest.approx(27.2 / 27.68 - 1)
    assert cell("SparseGPT", 30.0).within is False
    assert cell("Dense", 5.48).within is True


def test_results_with_a_different_protocol_are_not_compared():
    found = cell("SparseGPT", 27.2, config__calibration__samples=16)
    assert found.within is None
    assert found.why_not == "calibration.samples is 16, in the paper 128"
    for name, value in {"evaluation__limit": 2, "pipeline__layers": ["*.0.*"], "pipeline__true_sequential": True}.items():
        assert cell("SparseGPT", 27.2, **{f"config__{name}": value}).within is None, name
    assert cell("Dense", 5.48, config__evaluation__limit=2).within is None


def test_comparison_is_independent_of_the_seed_order():
    seeds = [record("ROSE", 26.0, 0), record("ROSE", 27.0, 1)]
    for records in (seeds, seeds[::-1]):
        (table,) = [t for t in gather(records).tables if t.metric == METRIC]
        published = table.cells["ROSE"]["0.7"].published
        assert published.within is True
        assert published.deviation == pytest.approx(26.5 / 26.38 - 1)


def test_secondary_results_are_marked_and_unknown_cells_stay_empty():
    assert cell("SparseGPT", 11.1, pattern="2:4").trust == "secondary"
    assert cell("Wanda", 11.1, pattern="2:4") is None
    assert cell("SparseGPT", 7.0, ratio=0.5) is None
    assert cell("SparseGPT", 27.0, config__model__path="another/model") is None


def test_published_dsnot_starts_from_the_sparsegpt_mask():
    assert cell("DSnoT", 60.0) is None
    assert cell("DSnoT", 60.0, config__method__options={"initial": "sparsegpt"}).value == 60.44


def test_minutes_are_shown_without_a_tolerance():
    (table,) = [t for t in gather([record("ROSE", 26.0)]).tables if t.metric == "minutes.pruning"]
    published = table.cells["ROSE"]["0.7"].published
    assert (published.value, published.trust, published.within) == (5.15, "secondary", None)


def images_cell(label, model="stabilityai/stable-diffusion-3-medium-diffusers", **changes):
    """Return the published ImageReward that corresponds to a run of a diffusion model."""
    run = record("SparseGPT", 10.0) | {"label": label}
    own = flat(settings_of("model=sd3-medium", "evaluation.images.samples=5000").model_dump(mode="json")) | changes
    run["config"] = nested(own)
    run["config"]["method"]["name"] = "dense" if label == "Dense" else "sparsegpt"
    run["config"]["model"]["path"] = model
    return find([run], "images.image_reward", 0.5)


def nested(values):
    found = {}
    for name, value in values.items():
        place = found
        *above, last = name.split(".")
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return found


def test_diffusion_results_are_matched_by_the_settings_of_their_table():
    assert images_cell("OBS-Diff").value == 0.6468
    assert images_cell("Dense").value == 0.9029
    ablation = {"evaluation.images.samples": 1000}
    assert images_cell("OBS-Diff", **ablation, **{"diffusion.weighting": "uniform"}).value == 0.6355
    assert images_cell("OBS-Diff", **ablation).value == 0.6438
    third = {"sparsity.ratio": 0.3, "evaluation.images.samples": 1000}
    assert images_cell("OBS-Diff", **third, **{"diffusion.packages": 20}).value == 0.8564
    removed = {"sparsity.pattern": "structured", "sparsity.ratio": 0.2}
    assert images_cell("OBS-Diff", **removed).value == 0.4997
    assert images_cell("OBS-Diff", **{"sparsity.ratio": 0.35}) is None


def test_diffusion_results_have_no_tolerance():
    found = images_cell("OBS-Diff", **{"diffusion.steps": 10})
    assert (found.within, found.trust) == (None, "primary")
    assert found.why_not == "diffusion.steps is 10, in the paper 25; no tolerance is known"
