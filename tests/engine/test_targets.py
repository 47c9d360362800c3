"""Regression targets against least squares on the tokens."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import CrossMoments, Refine, Target, Unstructured, prune_layer
from rose_exp.engine.curvature import Curvature

from .cases import layer, moments_of


def drifted(rows=8, columns=12, tokens=200):
    """Return W, x, δ and ε."""
    torch.manual_seed(1)
    weight, inputs = layer(rows, columns, tokens=tokens, dtype=torch.float64)
    inputs = inputs.double()
    return weight, inputs, 0.3 * torch.randn_like(inputs) + 0.2 * inputs.roll(1, 1), torch.randn(tokens, rows).double()


def cross_moments_of(inputs, delta, missing=None):
    cross_moments = CrossMoments(inputs.shape[1], None if missing is None else missing.shape[1], dtype=torch.float64)
    for part in torch.arange(len(inputs)).split(64):
        cross_moments.update(inputs[part], (inputs + delta)[part], None if missing is None else missing[part])
    return cross_moments


def ridge(inputs, outputs, damping):
    """Fit outputs ≈ T x by least squares on the tokens, with the damping appended as additional tokens."""
    n, columns = inputs.shape
    power = (damping * inputs.square().mean() * n) ** 0.5
    rows = torch.cat([inputs, power * torch.eye(columns, dtype=inputs.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([outputs, torch.zeros(columns, outputs.shape[1], dtype=inputs.dtype)])).solution.T


@pytest.mark.parametrize("with_residual", [False, True])
def test_target_shift_is_the_ridge_fit_of_the_missing_output(with_residual):
    weight, inputs, delta, missing = drifted()
    cross_moments = cross_moments_of(inputs, delta, missing if with_residual else None)
    curvature = Curvature(moments_of(inputs, torch.float64), 0.01, torch.float64)
    (found,) = Target(1.0, 1.0, damping=0.1).of([weight], curvature, cross_moments)
    wanted = delta @ weight.T + (missing if with_residual else 0)
    torch.testing.assert_close(found - weight, ridge(inputs, wanted, 0.1))
    (half,) = Target(0.5, 0.5, damping=0.1).of([weight], curvature, cross_moments)
    torch.testing.assert_close(half, (weight + found) / 2)


@pytest.mark.parametrize("with_residual", [False, True])
def test_sums_with_the_weight_give_the_same_target(with_residual):
    """Also after a permutation of the columns, and after the layer's own output is subtracted."""
    weight, inputs, delta, missing = drifted(3, 20, 300)
    given = missing + delta @ weight.T if with_residual else None
    order = torch.randperm(20)
    moments = moments_of(inputs, torch.float64)
    found = []
    for own in (None, weight):
        cross_moments = CrossMoments(20, 3 if with_residual else None, weight=own, dtype=torch.float64)
        for part in torch.arange(len(inputs)).split(64):
            extra = given[part] if with_residual else None
            cross_moments.update(inputs[part], (inputs + delta)[part], extra)
        if with_residual:
            cross_moments.subtract_own_output(weight)
        for layer_weight, own_moments, cross in (
            (weight, moments, cross_moments),
            (weight[:, order], moments.permuted(order), cross_moments.permuted(order)),
        ):
            curvature = Curvature(own_moments, 0.01, torch.float64)
            found.append(Target(0.7, 0.4).of([layer_weight], curvature, cross)[0])
    torch.testing.assert_close(found[2], found[0])
    torch.testing.assert_close(found[3], found[1])


def test_sums_with_the_weight_are_independent_of_the_split_into_updates():
    weight, inputs, delta, _ = drifted(3, 20, 3000)
    found = []
    for length in (1, 700, 3000):
        cross_moments = CrossMoments(20, weight=weight.float())
        for part in torch.arange(len(inputs)).split(length):
            cross_moments.update(inputs[part].float(), (inputs + delta)[part].float())
        cross_moments.finish()
        found.append(cross_moments.gram)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_sums_of_another_weight_raise_an_error():
    weight, inputs, delta, _ = drifted()
    cross_moments = CrossMoments(12, weight=weight[:5], dtype=torch.float64)
    cross_moments.update(inputs, inputs + delta)
    options = {"sparsity": Unstructured(0.5), "target": Target(0.5), "cross_moments": cross_moments}
    message = r"cross_moments: expected a single weight of shape \(5, 12\), got \[\(8, 12\)\]"
    with pytest.raises(ValueError, match=message):
        prune_layer(weight, moments_of(inputs, torch.float64), **options)
    with pytest.raises(ValueError, match=r"weight: expected shape \(rows, 12\), got \(12, 8\)"):
        CrossMoments(12, weight=weight.T)


def test_subtract_own_output_corrects_the_residual():
    weight, inputs, delta, missing = drifted()
    expected = cross_moments_of(inputs, delta, missing)
    after = cross_moments_of(inputs, delta, missing + delta @ weight.T)
    after.subtract_own_output(weight)
    torch.testing.assert_close(after.residual, expected.residual)


def test_the_regression_target_is_pruned():
    weight, inputs, delta, missing = drifted(24, 32, 600)
    moments, cross_moments, target = (
        moments_of(inputs, torch.float64),
        cross_moments_of(inputs, delta, missing),
        Target(0.7, 0.4),
    )
    (target_weight,) = target.of([weight], Curvature(moments, 0.01, torch.float64), cross_moments)
    options = {"sparsity": Unstructured(0.6), "block_size": 16, "refine": Refine(4, mask_iterations=5)}
    found = prune_layer(weight, moments, cross_moments=cross_moments, target=target, **options)
    expected = prune_layer(target_weight, moments, **options)
    torch.testing.assert_close(found.weight, expected.weight)
    assert found.target_error == pytest.approx(expected.error)
    assert found.unrefined_error == pytest.approx(
        prune_layer(target_weight, moments, sparsity=Unstructured(0.6), block_size=16).error
    )
    gone = weight - found.weight
    hessian = moments.hessian()
    assert found.error == pytest.approx(float(((gone @ hessian) * gone).sum() / ((weight @ hessian) * weight).sum()))


def test_invalid_arguments_raise_an_error():
    weight, inputs, delta, missing = drifted()
    moments, cross_moments = moments_of(inputs, torch.float64), cross_moments_of(inputs, delta, missing)
    with pytest.raises(ValueError, match="cross_moments: expected those of 12 columns for the target, got none"):
        prune_layer(weight, moments, sparsity=Unstructured(0.5), target=Target(0.5, 0.5))
    with pytest.raises(ValueError, match=r"dense: expected the shape of inputs, \(..., 12\), got \(3, 11\) and \(3, 12\)"):
        cross_moments.update(torch.zeros(3, 12), torch.zeros(3, 11))
    with pytest.raises(ValueError, match="strength: expected a number from 0 to 1, got 1.5"):
        Target(1.5)
    cross_moments.gram[0, 0] = torch.nan
    with pytest.raises(ValueError, match="cross_moments: expected finite numbers, got NaN or infinity"):
        prune_layer(weight, moments, sparsity=Unstructured(0.5), target=Target(0.5, 0.5), cross_moments=cross_moments)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_regression_target_with_a_failed_factor_raises_an_error(method):
    """A failed Cholesky factor holds finite values, and magnitude pruning computes no factor that could fail as well."""
    weight, inputs, delta, _ = drifted()
    moments, cross_moments = moments_of(inputs, torch.float64), cross_moments_of(inputs, delta)
    moments.gram[0, 1] = moments.gram[1, 0] = 5 * moments.gram.diagonal().max()  # not positive semidefinite
    (found,) = Target(0.5, 0.5).of([weight], Curvature(moments, 0.01, torch.float64), cross_moments)
    assert not torch.isfinite(found).any()
    with pytest.raises(ValueError, match="target: expected finite numbers, got NaN or infinity"):
        prune_layer(
            weight, moments, method=method, sparsity=Unstructured(0.5), target=Target(0.5, 0.5), cross_moments=cross_moments
        )


@pytest.mark.parametrize("with_residual", [False, True])
def test_permuted_moments_equal_moments_of_permuted_inputs(with_residual):
    """Covers all moments and cross moments on which regression targets depend."""
    weight, inputs, delta, missing = drifted()
    order = torch.randperm(weight.shape[1])
    given = missing if with_residual else None
    moments, cross_moments = (
        moments_of(inputs, torch.float64).permuted(order),
        cross_moments_of(inputs, delta, given).permuted(order),
    )
    expected = moments_of(inputs[:, order], torch.float64)
    torch.testing.assert_close(moments.hessian(), expected.hessian())
    torch.testing.assert_close(moments.mean(), expected.mean())
    assert (moments.tokens, cross_moments.tokens) == (expected.tokens, len(inputs))
    options = {"sparsity": Unstructured(0.5), "target": Target(0.7, 0.6)}
    expected_result = prune_layer(
        weight[:, order], expected, cross_moments=cross_moments_of(inputs[:, order], delta[:, order], given), **options
    )
    torch.testing.assert_close(
        prune_layer(weight[:, order], moments, cross_moments=cross_moments, **options).weight, expected_result.weight
    )
