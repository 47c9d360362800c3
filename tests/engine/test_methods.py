"""Magnitude, Wanda and DSnoT against elementwise definitions."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import DSnoT, SemiStructured, Unstructured, prune_layer

from .. import reference
from .cases import layer, moments_of

SHARES = [0.0, 0.25, 0.5, 0.77, 1.0]


@pytest.mark.parametrize("share", SHARES)
def test_magnitude_prunes_the_smallest_weights_of_the_layer(share):
    weight, inputs = layer(10, 30)
    result = prune_layer(weight, moments_of(inputs), method="magnitude", sparsity=Unstructured(share))
    assert torch.equal(result.mask, reference.marked(weight.abs(), share, inclusive=False))
    assert torch.equal(result.weight, weight.masked_fill(result.mask, 0))


@pytest.mark.parametrize("share", SHARES)
def test_wanda_prunes_the_smallest_scores_of_each_row(share):
    weight, inputs = layer(10, 30, columnar=True)
    result = prune_layer(weight, moments_of(inputs), method="wanda", sparsity=Unstructured(share))
    scores = weight.abs() * inputs.norm(dim=0)
    expected = torch.stack([reference.marked(row, share, inclusive=False) for row in scores])
    assert torch.equal(result.mask, expected)
    assert torch.equal(result.weight, weight.masked_fill(expected, 0))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize(("pruned", "group"), [(2, 4), (4, 8), (1, 4), (3, 7), (5, 20)])
def test_semi_structured_patterns_prune_the_smallest_of_each_group(method, pruned, group):
    weight, inputs = layer(6, 45, columnar=True)
    result = prune_layer(weight, moments_of(inputs), method=method, sparsity=SemiStructured(pruned, group))
    scores = weight.abs() * (inputs.norm(dim=0) if method == "wanda" else 1)
    assert torch.equal(result.mask, reference.marked_in_groups(scores, pruned, group))


def test_wanda_does_not_depend_on_the_order_of_the_samples():
    """The released code weights sample k by 1/k; here all tokens have equal weight."""
    weight, inputs = layer(20, 40)
    inputs[:80] *= torch.rand(40) * 5
    forward = prune_layer(weight, moments_of(inputs), method="wanda", sparsity=Unstructured(0.5))
    backward = prune_layer(weight, moments_of(inputs.flip(0)), method="wanda", sparsity=Unstructured(0.5))
    assert torch.equal(forward.mask, backward.mask)


def dsnot_case(columns=48):
    weight, inputs = layer(24, columns)
    return weight, inputs * torch.rand(columns) + torch.randn(columns)  # nonzero means, so that there is an error to cancel


def reference_dsnot(weight, inputs, initial, mask, **options):
    mean, variance = inputs.mean(dim=0), inputs.var(dim=0, unbiased=False)
    wanda = weight.abs() * inputs.square().mean(dim=0).sqrt()
    return torch.tensor(
        [
            reference.dsnot_row(
                weight[i].tolist(), wanda[i].tolist(), mean.tolist(), variance.tolist(), mask[i].tolist(),
                initial=initial[i].tolist(), **options,
            )
            for i in range(len(weight))
        ]
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("initial", ["wanda", "magnitude"])
def test_dsnot_equals_the_reference(share, initial):
    weight, inputs = dsnot_case()
    scores = weight.abs() * (inputs.square().mean(dim=0).sqrt() if initial == "wanda" else 1)
    start = torch.stack([reference.marked(row, share, inclusive=False) for row in scores])
    result = prune_layer(weight, moments_of(inputs), method=DSnoT(initial=initial), sparsity=Unstructured(share))
    assert torch.equal(result.mask, reference_dsnot(weight, inputs, scores, start))
    assert not torch.equal(result.mask, start)
    assert (result.mask.sum(dim=1) == int(48 * share)).all()


@pytest.mark.parametrize(("pruned", "group"), [(2, 4), (4, 8), (3, 4)])
def test_semi_structured_dsnot_equals_the_reference(pruned, group):
    weight, inputs = dsnot_case()
    scores = weight.abs() * inputs.square().mean(dim=0).sqrt()
    start = reference.marked_in_groups(scores, pruned, group)
    result = prune_layer(weight, moments_of(inputs), method="dsnot", sparsity=SemiStructured(pruned, group))
    assert torch.equal(result.mask, reference_dsnot(weight, inputs, scores, start, group=group))
    assert not torch.equal(result.mask, start)
    assert (result.mask.view(24, -1, group).sum(dim=2) == pruned).all()


def test_dsnot_reduces_the_mean_error():
    weight, inputs = dsnot_case(columns=512)
    moments = moments_of(inputs)
    wanda = prune_layer(weight, moments, method="wanda", sparsity=Unstructured(0.5))
    dsnot = prune_layer(weight, moments, method="dsnot", sparsity=Unstructured(0.5))
    error = lambda result: ((weight - result.weight) @ moments.mean()).abs().mean()  # noqa: E731
    assert error(dsnot) < 0.2 * error(wanda)


def test_dsnot_without_cycles_keeps_the_initial_mask():
    weight, inputs = dsnot_case()
    moments = moments_of(inputs)
    wanda = prune_layer(weight, moments, method="wanda", sparsity=Unstructured(0.5))
    still = prune_layer(weight, moments, method=DSnoT(max_cycles=0), sparsity=Unstructured(0.5))
    assert torch.equal(still.mask, wanda.mask)


def test_dsnot_from_sparsegpt_starts_from_the_obs_saliency():
    weight, inputs = dsnot_case()
    moments = moments_of(inputs, torch.float64)
    hessian = moments.hessian()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    scores = (weight / upper.diagonal()).square()
    expected = torch.stack([reference.marked(row, 0.5, inclusive=False) for row in scores])
    method = DSnoT(initial="sparsegpt", max_cycles=0)
    assert torch.equal(prune_layer(weight, moments, method=method, sparsity=Unstructured(0.5)).mask, expected)


def test_dsnot_handles_constant_and_dead_input_channels():
    weight, inputs = dsnot_case()
    inputs[:, 5] = 2.0  # zero variance
    inputs[:, 9] = 0.0
    result = prune_layer(weight, moments_of(inputs), method="dsnot", sparsity=Unstructured(0.5))
    assert (result.mask.sum(dim=1) == 24).all()
    assert torch.isfinite(result.weight).all()


def dsnot_row(weights: list[float], means: list[float], sparsity, **options) -> list[bool]:
    """Return the mask of one row. Each weight adds weight · mean to the error without rounding; variances are equal."""
    means = torch.tensor(means) / 2048
    inputs = torch.stack([means + 1, means - 1])
    weight = torch.tensor([weights], dtype=torch.float32)
    return prune_layer(weight, moments_of(inputs), method=DSnoT(**options), sparsity=sparsity).mask[0].tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_dsnot_skips_rows_whose_error_is_at_the_threshold(sign):
    row = [sign * w for w in (1, 2, 4, -8)]  # the pruned weights cause an error of 3
    assert dsnot_row(row, [1] * 4, Unstructured(0.5), update_threshold=3.0) == [True, True, False, False]
    assert dsnot_row(row, [1] * 4, Unstructured(0.5), update_threshold=2.99, max_cycles=1) == [True, False, False, True]


@pytest.mark.parametrize("sign", [1, -1])
def test_dsnot_prunes_only_weights_that_change_the_error(sign):
    row = [sign * w for w in (1, 2, -3, -8)]
    assert dsnot_row(row, [1, 1, 1, 1], Unstructured(0.5), max_cycles=1) == [True, False, True, False]
    assert dsnot_row(row, [1, 1, 0, 1], Unstructured(0.5), max_cycles=1) == [True, False, False, True]


@pytest.mark.parametrize("sign", [1, -1])
def test_dsnot_stops_when_no_other_weight_can_be_pruned(sign):
    assert dsnot_row([sign * w for w in (1, 2, 4, 8)], [1] * 4, Unstructured(0.5)) == [True, True, False, False]


@pytest.mark.parametrize("sign", [1, -1])
def test_dsnot_grows_the_only_pruned_weight(sign):
    assert dsnot_row([sign * w for w in (1, 2, 4, -8)], [1] * 4, Unstructured(0.25)) == [False, False, False, True]


def test_invalid_options_raise_an_error_that_names_them():
    with pytest.raises(ValueError, match="initial: expected one of wanda, magnitude, sparsegpt, got 'random'"):
        DSnoT(initial="random")
    with pytest.raises(ValueError, match="max_cycles: expected at least 0, got -1"):
        DSnoT(max_cycles=-1)
