"""Structured pruning against a slow reference that recomputes all inverses for each removed group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rose_exp.engine import InputMoments, NotPositiveDefiniteError
from rose_exp.engine.groups import GroupedLayer, Structured, prune_groups

from .cases import layer, moments_of

DOUBLE = torch.float64


def grouped(rows: int, groups: int, width: int, tokens: int = 0) -> GroupedLayer:
    weight, inputs = layer(rows, groups * width, tokens, dtype=DOUBLE)
    return GroupedLayer(weight, moments_of(inputs, DOUBLE), torch.arange(groups * width).view(groups, width))


def damped(of: GroupedLayer, damping: float) -> Tensor:
    hessian = of.moments.hessian()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=DOUBLE)


def fitted(of: GroupedLayer, stay: list[int], hessian: Tensor) -> Tensor:
    """Fit the kept columns by least squares: min tr((W−V) H (W−V)ᵀ) over V that is zero elsewhere."""
    weight = torch.zeros_like(of.weight)
    weight[:, stay] = torch.linalg.solve(hessian[stay][:, stay], (of.weight @ hessian)[:, stay].T).T
    return weight


def slow(layers: list[GroupedLayer], count: int, saliency: str, damping: float = 0.01) -> list[int]:
    """Return the removed groups in order of removal."""
    gone: list[int] = []
    for _ in range(count):
        fused = {group: 0.0 for group in range(len(layers[0].columns)) if group not in gone}
        for of in layers:
            hessian = damped(of, damping)
            stay = [c for group in fused for c in of.columns[group].tolist()]
            weight, inverse = fitted(of, stay, hessian), torch.linalg.inv(hessian[stay][:, stay])
            losses = {}
            for group in fused:
                places = [stay.index(c) for c in of.columns[group].tolist()]
                w = weight[:, of.columns[group]]
                if saliency == "diagonal":
                    losses[group] = float(sum(w[:, i].square().sum() / inverse[k, k] for i, k in enumerate(places)))
                else:
                    losses[group] = float((w @ torch.linalg.inv(inverse[places][:, places]) @ w.T).trace())
            for rank, group in enumerate(sorted(fused, key=losses.get), start=1):
                fused[group] += 1 / (60 + rank)
        gone.append(max(fused, key=fused.get))
    return gone


@pytest.mark.parametrize("saliency", ["diagonal", "exact"])
@pytest.mark.parametrize("consumers", [1, 2])
def test_groups_and_compensation_equal_the_slow_reference(saliency, consumers):
    layers = [grouped(5 + 3 * i, 7, 4) for i in range(consumers)]
    found = prune_groups(layers, 4, saliency=saliency)
    assert found.order == slow(layers, 4, saliency)
    assert found.removed.nonzero().flatten().tolist() == sorted(found.order)
    for of, weight, error in zip(layers, found.weights, found.errors, strict=True):
        stay = of.columns[~found.removed].flatten().tolist()
        torch.testing.assert_close(weight, fitted(of, stay, damped(of, 0.01)), rtol=1e-9, atol=1e-12)
        assert not weight[:, of.columns[found.removed].flatten()].any()
        hessian, lost = of.moments.hessian(), of.weight - weight
        expected = (lost @ hessian @ lost.T).trace() / (of.weight @ hessian @ of.weight.T).trace()
        assert error == pytest.approx(float(expected))


def test_removing_neurons_one_at_a_time_equals_the_slow_reference():
    of = grouped(6, 12, 1)
    assert prune_groups([of], 7).order == slow([of], 7, "diagonal")


def test_removing_several_groups_at_once_uses_the_initial_scores():
    of = grouped(6, 12, 1)
    together = prune_groups([of], 3, at_once=3).order
    hessian = damped(of, 0.01)
    losses = of.weight.square().sum(dim=0) / torch.linalg.inv(hessian).diagonal()
    assert together == losses.argsort()[:3].tolist()


def test_exact_saliency_equals_the_cost_of_removing_a_group():
    of = grouped(6, 8, 3)
    hessian = damped(of, 0.01)
    first = prune_groups([of], 1, saliency="exact")
    costs = []
    for group in range(8):
        stay = [c for c in range(24) if c not in of.columns[group].tolist()]
        lost = of.weight - fitted(of, stay, hessian)
        costs.append(float((lost @ hessian @ lost.T).trace()))
    assert first.order == [min(range(8), key=costs.__getitem__)]


def test_removing_no_group_returns_the_weights_unchanged():
    of = grouped(5, 4, 2)
    found = prune_groups([of], 0)
    assert torch.equal(found.weights[0], of.weight)
    assert found.errors == [0.0]
    assert found.order == []


def test_previously_removed_and_ungrouped_columns():
    weight, inputs = layer(6, 12, dtype=DOUBLE)
    gone = torch.tensor([1, 4])
    weight[:, gone] = 0
    of = GroupedLayer(weight, moments_of(inputs, DOUBLE), torch.tensor([[6, 7], [8, 9], [10, 11]]), gone)
    found = prune_groups([of], 2)
    removed = of.columns[found.removed].flatten().tolist()
    stay = [c for c in range(12) if c not in removed and c not in (1, 4)]
    torch.testing.assert_close(found.weights[0], fitted(of, stay, damped(of, 0.01)), rtol=1e-9, atol=1e-12)
    assert not found.weights[0][:, gone].any()


def test_wanda_and_magnitude_rank_by_norm_and_update_no_weights():
    weight, inputs = layer(5, 12, dtype=DOUBLE)
    inputs[:, :6] *= torch.linspace(0.1, 3, 6)
    columns, moments = torch.arange(12).view(6, 2), moments_of(inputs, DOUBLE)
    coupled = torch.tensor([9.0, 1, 2, 3, 4, 5], dtype=DOUBLE)
    of = GroupedLayer(weight, moments, columns, coupled=coupled)
    l1 = weight.abs().sum(dim=0).view(6, 2).sum(dim=1) + coupled
    wanda = (weight.abs() * inputs.square().mean(dim=0).sqrt()).sum(dim=0).view(6, 2).sum(dim=1)
    for method, scores in (("magnitude", l1), ("wanda", wanda)):
        found = prune_groups([of], 3, method=method)
        assert found.order == scores.argsort()[:3].tolist()
        expected = weight.clone()
        expected[:, columns[found.order].flatten()] = 0
        assert torch.equal(found.weights[0], expected)
        assert found.damping == 0


def test_compensation_reduces_the_error():
    of = grouped(16, 10, 2)
    scores = {m: prune_groups([of], 5, method=m).errors[0] for m in ("magnitude", "sparsegpt")}
    assert scores["sparsegpt"] < 0.8 * scores["magnitude"]


def test_dead_input_channels_and_increased_damping():
    weight, inputs = layer(4, 8, dtype=DOUBLE)
    inputs[:, 2:4] = 0
    of = GroupedLayer(weight, moments_of(inputs, DOUBLE), torch.arange(8).view(4, 2))
    assert torch.isfinite(prune_groups([of], 2, damping=0).weights[0]).all()
    few = GroupedLayer(weight, moments_of(inputs[:2], DOUBLE), torch.arange(8).view(4, 2))
    assert prune_groups([few], 2, damping=0).damping > 0


def test_counts_round_to_nearest_and_keep_at_least_one_group():
    assert Structured(0.15).count(38) == 6
    assert Structured(0.99).count(4) == 3
    assert Structured(0).count(9) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 4}, "count: expected 0 to 3"),
        ({"method": "dsnot"}, "method: expected one of sparsegpt, wanda, magnitude"),
        ({"damping": -1.0}, "damping: expected a finite number"),
    ],
)
def test_invalid_arguments_raise_an_error(change, message):
    of = grouped(3, 4, 2)
    with pytest.raises(ValueError, match=message):
        prune_groups([of], **({"count": 1} | change))


def test_invalid_layers_raise_an_error():
    of = grouped(3, 4, 2)
    twice = GroupedLayer(of.weight, of.moments, torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match="columns: expected 2 groups that share no column"):
        prune_groups([twice], 1)
    with pytest.raises(ValueError, match="weight: expected shape"):
        prune_groups([GroupedLayer(of.weight[:, 1:], of.moments, of.columns)], 1)
    broken = InputMoments(8, dtype=DOUBLE)
    broken.update(torch.full((2, 8), float("nan"), dtype=DOUBLE))
    with pytest.raises(ValueError, match="NaN"):
        prune_groups([GroupedLayer(of.weight, broken, of.columns)], 1)
    with pytest.raises(ValueError, match="at least one"):
        prune_groups([], 1)


def test_indefinite_hessian_raises_an_error():
    of = grouped(3, 4, 2)
    of.moments.gram.copy_(1e9 * (torch.eye(8, dtype=DOUBLE).flip(0)) + torch.eye(8, dtype=DOUBLE))
    with pytest.raises(NotPositiveDefiniteError, match="8 columns"):
        prune_groups([of], 1)
