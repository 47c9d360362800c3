"""Structured pruning of heads and neurons by a plan that passes all of its options to the engine."""

from __future__ import annotations

import copy

import pytest
import torch

from rose_exp.engine import InputMoments, Magnitude, SparseGPT, Structured, Wanda
from rose_exp.engine.groups import GroupedLayer, prune_groups
from rose_exp.models import find_structures
from rose_exp.pruning import PruningPlan
from rose_exp.pruning.structured import prune_structure

from ..models.families import build


def structure_of(kind: str):
    model = build("llama")
    return next(of for of in find_structures(model.model.layers[0]) if of.kind == kind)


def moments_for(structure) -> dict[str, InputMoments]:
    torch.manual_seed(3)
    (part,) = structure.consumers
    mixing = torch.randn(part.layer.columns, part.layer.columns)
    moments = InputMoments(part.layer.columns)
    moments.update(torch.randn(60, part.layer.columns) @ mixing)
    return {part.layer.name: moments}


@pytest.mark.parametrize(
    ("kind", "method", "sparsity", "damping"),
    [
        ("heads", "sparsegpt", Structured(0.5), 0.01),
        ("heads", "sparsegpt", Structured(0.5, saliency="exact"), 0.01),
        ("neurons", "sparsegpt", Structured(0.3, at_once=2), 0.01),
        ("neurons", "sparsegpt", Structured(0.3, at_once=64), 0.01),
        ("neurons", "sparsegpt", Structured(0.3), 0.5),
        ("neurons", "magnitude", Structured(0.3), 0.01),
        ("neurons", "wanda", Structured(0.3), 0.01),
    ],
)
def test_plan_options_are_passed_to_the_engine(kind, method, sparsity, damping):
    structure = structure_of(kind)
    (part,), moments = structure.consumers, moments_for(structure)
    layer = GroupedLayer(
        part.layer.weight.clone(), moments[part.layer.name], part.places, coupled=structure.makers_norm().clone()
    )
    expected = prune_groups(
        [layer],
        sparsity.count(structure.groups),
        method=method,
        saliency=sparsity.saliency,
        damping=damping,
        at_once=sparsity.at_once if kind == "neurons" else 1,
    )
    methods = {"sparsegpt": SparseGPT(), "magnitude": Magnitude(), "wanda": Wanda()}
    (report,) = prune_structure(structure, moments, PruningPlan(methods[method], sparsity, damping=damping))
    assert torch.equal(part.layer.weight, expected.weights[0])
    assert report.error == pytest.approx(expected.errors[0])
    assert report.removed == int(expected.removed.sum()) == sparsity.count(structure.groups)


def test_options_change_the_removed_groups():
    """Otherwise the test above would not detect that an option is ignored."""
    orders = {}
    for name, options in {"one": {"at_once": 1}, "many": {"at_once": 64}, "damped": {"at_once": 64, "damping": 0.5}}.items():
        structure = structure_of("neurons")
        (part,), moments = structure.consumers, moments_for(structure)
        layer = GroupedLayer(part.layer.weight, moments[part.layer.name], part.places)
        orders[name] = tuple(sorted(prune_groups([layer], 16, **options).order))
    assert len(set(orders.values())) == 3


def test_saliency_determines_the_removed_head():
    heads = structure_of("heads")
    (part,) = heads.consumers
    for seed in range(20):
        torch.manual_seed(seed)
        moments = InputMoments(part.layer.columns)
        moments.update(torch.randn(40, moments.columns) @ torch.randn(moments.columns, moments.columns))
        layer = GroupedLayer(part.layer.weight, moments, part.places)
        first = {kind: prune_groups([layer], 1, saliency=kind).order for kind in ("diagonal", "exact")}
        if first["diagonal"] != first["exact"]:
            break
    assert first["diagonal"] != first["exact"]
    for saliency, order in first.items():
        own = structure_of("heads")
        plan = PruningPlan(SparseGPT(), Structured(0.5, saliency=saliency))
        prune_structure(own, {own.consumers[0].layer.name: moments}, plan)
        assert own.masked().nonzero().flatten().tolist() == order


def test_magnitude_includes_the_layers_that_produce_a_neuron():
    structure = structure_of("neurons")
    plain = copy.deepcopy(structure.consumers[0].layer.weight)
    with torch.no_grad():
        structure.makers[0].layer.module.weight[5:] *= 100  # the first five have the smallest norms despite larger consumers
        structure.consumers[0].layer.module.weight[:, :5] *= 3
    prune_structure(structure, moments_for(structure), PruningPlan(Magnitude(), Structured(5 / 52)))
    assert structure.masked().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(structure.consumers[0].layer.weight[:, 5:], plain[:, 5:])


def test_previously_removed_columns_are_ignored():
    """In Flux, one layer reads heads and neurons: the kept columns compensate for previously removed heads."""
    structure = structure_of("neurons")
    (part,), moments = structure.consumers, moments_for(structure)
    half = part.places[26:]
    narrow = type(structure)(structure.name, "neurons", structure.owner, (type(part)(part.layer, half),), ())
    with torch.no_grad():
        part.layer.module.weight[:, :6] = 0
    dense = part.layer.weight.clone()
    prune_structure(narrow, moments, PruningPlan(SparseGPT(), Structured(0.5)))
    assert not part.layer.weight[:, :6].any()
    stay = [c for c in range(52) if c >= 6 and (part.layer.weight[:, c] != 0).any()]
    assert len(stay) == 52 - 6 - 13
    hessian = moments[part.layer.name].hessian().double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(52, dtype=torch.float64)
    fitted = torch.linalg.solve(hessian[stay][:, stay], (dense.double() @ hessian)[:, stay].T).T
    torch.testing.assert_close(part.layer.weight[:, stay], fitted.float(), rtol=1e-4, atol=1e-5)
