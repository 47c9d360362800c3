"""Sparsity allocation across layers."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import Allocation
from rose_exp.engine.allocation import BlockSurvey, loss_histogram, loss_shares, outlier_share, owl_shares

from .cases import layer


def surveyed(weight, inputs):
    return loss_histogram(weight, inputs.square().mean(dim=0), (inputs @ weight.T).square().sum(dim=1).mean())


def some_layers(sizes=((24, 40), (64, 24), (10, 80), (50, 50))):
    torch.manual_seed(0)
    return [(w * scale, x) for (w, x), scale in zip((layer(*size) for size in sizes), (1, 0.01, 7, 3), strict=True)]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_allocation_meets_the_overall_sparsity_exactly(ratio):
    layers = some_layers()
    sizes = [w.numel() for w, _ in layers]
    for shares in (
        loss_shares([surveyed(*each) for each in layers], ratio, 0.1),
        owl_shares([0.01, 0.05, 0.03, 0.02], sizes, ratio, 0.08),
    ):
        counts = [int(size * share) for size, share in zip(sizes, shares, strict=True)]
        assert sum(counts) == int(sum(sizes) * ratio)
        assert all(0 <= share <= 1 for share in shares)


def test_losses_rule_applies_one_global_threshold():
    """The reference sorts the losses of all weights of all layers."""
    layers = some_layers()
    losses = [w.square() * x.square().mean(dim=0) / (x @ w.T).square().sum(dim=1).mean() for w, x in layers]
    everything = torch.cat([loss.flatten() for loss in losses])
    threshold = everything.sort().values[int(len(everything) * 0.6)]
    expected = [float((loss < threshold).double().mean()) for loss in losses]
    found = loss_shares([surveyed(*each) for each in layers], 0.6, 1.0)
    assert found == pytest.approx(expected, abs=0.01)  # a histogram bin is 1/32 of an octave
    assert max(found) - min(found) > 0.1


def test_spread_bounds_the_deviation_of_each_layer():
    found = loss_shares([surveyed(*each) for each in some_layers()], 0.6, 0.05)
    assert min(found) == pytest.approx(0.55, abs=1e-3)
    assert max(found) == pytest.approx(0.65, abs=1e-3)


def test_loss_histogram_is_invariant_to_scale():
    (weight, inputs), *_ = some_layers()
    assert torch.equal(surveyed(weight, inputs), surveyed(weight * 4, inputs / 2))


def test_owl_allocates_sparsity_by_outliers():
    """The paper's formula: densities 1 − S lie between −λ and +λ around their mean, in proportion to the outliers."""
    outliers, spread = [0.02, 0.06, 0.03, 0.05], 0.08
    kept = [2 * spread * (x - 0.02) / 0.04 for x in outliers]
    mean = sum(kept) / 4
    expected = [0.7 - (k - mean) for k in kept]
    assert owl_shares(outliers, [1000] * 4, 0.7, spread) == pytest.approx(expected, abs=1e-3)
    alike = owl_shares([0.01] * 3, [10, 20, 30], 0.5, 0.08)
    assert [int(share * size) for share, size in zip(alike, (10, 20, 30), strict=True)] == [5, 10, 15]


def test_outlier_share_is_relative_to_the_mean_of_all_scores():
    scores = [torch.ones(2, 48), torch.full((2, 2), 60.0)]
    assert outlier_share(scores, 5.0) == pytest.approx(4 / 100)
    assert outlier_share(scores, 30.0) == 0.0  # the mean is 3.36


def test_allocation_covers_every_layer():
    layers = some_layers()

    def sizes(names):
        return {name: layers["abcd".index(name)][0].numel() for name in names}

    blocks = [
        BlockSurvey(sizes("ab"), 0.02, {"a": surveyed(*layers[0]), "b": surveyed(*layers[1])}),
        BlockSurvey(sizes("cd"), 0.05, {"c": surveyed(*layers[2]), "d": surveyed(*layers[3])}),
        BlockSurvey({}),  # no layer of this block is pruned
    ]
    owl = Allocation("owl").shares(blocks, 0.5)
    assert list(owl) == ["a", "b", "c", "d"]
    assert owl["a"] == pytest.approx(owl["b"], abs=1e-3)
    assert owl["a"] > owl["c"]
    assert Allocation("losses", 0.2).shares(blocks, 0.5)["a"] != pytest.approx(owl["a"], abs=1e-3)
    assert Allocation("losses").shares([], 0.5) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("best",), "rule: expected one of uniform, owl, losses, got 'best'"),
        (("owl", 2.0), "spread: expected a number from 0 to 1, got 2.0"),
        (("owl", 0.1, 0.0), "outlier: expected a finite number above 0, got 0.0"),
    ],
)
def test_invalid_options_raise_an_error_that_names_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        Allocation(*arguments)
