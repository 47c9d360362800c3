"""Figures drawn from run records and layer studies."""

from __future__ import annotations

import io
import json

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from rose_exp.engine import Ordering, SemiStructured, SparseGPT, Unstructured, prune_layer
from rose_exp.engine.study import RATIOS, study_layer
from rose_exp.pruning import PruneContext, PruningPlan, prune_model
from rose_exp.report.figures import (
    draw_figures,
    layers_figure,
    legend_below,
    orders_figure,
    reorderings_figure,
    write_study,
)
from rose_exp.report.terminal import show_config

from ..engine.cases import layer, moments_of
from ..models.families import build, tokens


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    weight, inputs = layer(30, 100, columnar=True)
    return weight, moments_of(inputs)


@pytest.fixture(scope="module")
def study(case):
    return study_layer(*case, Unstructured(0.7), block_size=32)


def record(reports):
    return {
        "label": "ROSE",
        "layers": [report.as_dict() for report in reports],
        "config": {"reorder": {"threshold": 0.5}, "sparsity": {"pattern": "unstructured", "ratio": 0.7}},
        "protocol": {"model": {"name": "tiny"}},
    }


def test_study_matches_pruning(case, study):
    weight, moments = case
    options = {"block_size": 32, "sparsity": Unstructured(0.7)}
    natural = prune_layer(weight, moments, **options)
    rose = prune_layer(weight, moments, ordering=Ordering(threshold=None), **options)
    assert study.moved[study.worst] == pytest.approx(natural.error, rel=1e-4)  # at its original position, left to right
    assert study.reorderings["descending"]["none"]["0.7"] == pytest.approx(natural.error, rel=1e-6)
    assert study.reorderings["ascending"]["none"] == study.reorderings["descending"]["none"]
    assert study.reorderings["descending"]["column+block"]["0.7"] == pytest.approx(rose.error, rel=1e-6)
    for errors in study.cumulative.values():
        assert len(errors) == len(study.moved) == 4
        assert errors == sorted(errors)
    assert study.cumulative["left to right"][-1] == pytest.approx(natural.error, rel=0.2)  # up to damping
    assert study.cumulative["left to right"][-1] > natural.error
    assert rose.error < natural.error  # the layer has column structure


def test_study_of_semi_structured_sparsity_matches_pruning(case):
    found = study_layer(*case, SemiStructured(2, 4), block_size=32)
    assert found.sparsity == "2:4"
    alone = prune_layer(*case, sparsity=SemiStructured(2, 4), block_size=32)
    assert found.moved[found.worst] == pytest.approx(alone.error, rel=1e-4)
    odd = study_layer(*case, SemiStructured(3, 7), block_size=32)
    alone = prune_layer(*case, sparsity=SemiStructured(3, 7), block_size=32)
    assert odd.moved[odd.worst] == pytest.approx(alone.error, rel=1e-4)
    assert all(errors == sorted(errors) for errors in found.cumulative.values())


def test_study_raises_the_damping_like_pruning():
    weight, inputs = layer(8, 40, tokens=1)
    found = study_layer(weight, moments_of(inputs), Unstructured(0.5), block_size=16, damping=0.0)
    assert found.damping >= 1e-4
    natural = prune_layer(weight, moments_of(inputs), sparsity=Unstructured(0.5), block_size=16, damping=found.damping)
    assert found.moved[found.worst] == pytest.approx(natural.error, rel=1e-3, abs=1e-7)


def test_study_figures_show_the_study_data(study, tmp_path):
    found = json.loads(write_study(tmp_path, "model.layers.0.o_proj", study.as_dict()).read_text())
    left, right = orders_figure(found).axes
    assert [line.get_label() for line in left.lines] == ["left to right", "ROSE", "ascending"]
    assert list(left.lines[1].get_ydata()) == study.cumulative["ROSE"]
    assert list(right.lines[0].get_ydata()) == study.moved
    descending, ascending = reorderings_figure(found).axes
    heights = [bar.get_height() for bar in descending.patches]
    assert heights == [errors[f"{r:g}"] for errors in study.reorderings["descending"].values() for r in RATIOS]
    assert ascending.get_title() == "ascending by expected loss"


def test_layers_figure_groups_layers_by_block_and_kind():
    plan = PruningPlan(method=SparseGPT(), sparsity=Unstructured(0.7), ordering=Ordering.rose(), block_size=8)
    reports = prune_model(build("llama"), tokens(), plan)
    errors, ranges = layers_figure(record(reports)).axes
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [line.get_label() for line in errors.lines] == kinds
    assert list(errors.lines[3].get_ydata()) == [r.error for r in reports if r.name.endswith("o_proj")]
    assert list(ranges.lines[0].get_ydata()) == [r.relative_range for r in reports if r.name.endswith("q_proj")]
    assert list(errors.lines[0].get_xdata()) == [0, 1, 2]
    assert errors.get_xlabel() == "transformer block"


def test_figures_are_drawn_for_layers_and_studies(tmp_path):
    plan = PruningPlan(method=SparseGPT(), sparsity=Unstructured(0.7), block_size=8, study=["*.1.*.o_proj"])
    reports = prune_model(
        build("llama"), tokens(), plan, PruneContext(on_study=lambda name, found: write_study(tmp_path, name, found.as_dict()))
    )
    drawn = draw_figures(record(reports), tmp_path)
    name = "model.layers.1.self_attn.o_proj"
    assert list(drawn) == ["layers", f"{name}.orders", f"{name}.weights", f"{name}.reorderings"]
    for path in drawn.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_config_is_shown_as_a_tree():
    out = io.StringIO()
    show_config({"model": {"path": None, "dtype": "auto"}, "layers": ["*[0]"], "skip": []}, Console(file=out, width=60))
    assert out.getvalue().splitlines() == [
        "configuration",
        "├── model",
        "│   └── dtype: auto",
        "├── layers: ['*[0]']",
        "└── skip: none",
    ]


@pytest.mark.parametrize(
    "labels", [["a"], ["a", "b"] * 4, ["a label of some thirty characters"] * 7, ["x" * 80] * 2, []], ids=len
)
@pytest.mark.parametrize("width", [6.4, 9])
def test_legends_below_the_axes_fit_the_figure(labels, width):
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    for label in labels:
        axes.plot([0, 1], [0, 1], label=label)
    legend_below(figure, axes)
    FigureCanvasAgg(figure).draw()
    box, below = figure.legends[0].get_window_extent(), axes.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= below.y0
