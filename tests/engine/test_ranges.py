"""Weights and inputs of any magnitude give correct results or a clear error."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch

from rose_exp.engine import (
    METHODS,
    DSnoT,
    Method,
    NotPositiveDefiniteError,
    Ordering,
    Refine,
    SemiStructured,
    SolverOptions,
    Target,
    Unstructured,
    prune_layer,
    prune_layers,
    relative_error,
)
from rose_exp.engine.allocation import loss_histogram
from rose_exp.engine.groups import METHODS_OF_GROUPS, GroupedLayer, prune_groups
from rose_exp.engine.methods import Layer, Solution
from rose_exp.engine.methods.oats import low_rank
from rose_exp.engine.study import study_layer
from rose_exp.engine.targets import CrossMoments

from .cases import layer, moments_of

SIZES = (1e-30, 1e-15, 1e-6, 1.0, 1e6, 1e15, 1e30)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PATTERNS = (Unstructured(0.5), Unstructured(0.9), SemiStructured(2, 4))
REFINEMENTS = (0, 3, Refine(3, mask_iterations=4))
ORDERS = (None, Ordering.rose(), Ordering(threshold=None, score="obs"), Ordering(threshold=None, score="magnitude"))
MATRIX = list(itertools.product(sorted(METHODS), PATTERNS, REFINEMENTS, SIZES, SIZES, DTYPES, (torch.float32, torch.float64)))
REFUSED = (ValueError, NotPositiveDefiniteError)


def check(case, seed: int) -> bool:
    """Return whether the layer is pruned; if so, check all numbers against float64."""
    method, sparsity, refine, of_weight, of_inputs, dtype, of_moments = case
    torch.manual_seed(seed)
    weight, inputs = layer(8, 24)
    weight, inputs = (weight.double() * of_weight).to(dtype), inputs * of_inputs
    if seed % 3 == 0:
        inputs[:, 5] = 0
    options = {"sparsity": sparsity, "ordering": ORDERS[seed % 4], "block_size": 8}
    refine = 0 if method == "oats" else refine
    try:
        result = prune_layer(weight, moments_of(inputs, of_moments), method=method, refine=refine, **options)
    except REFUSED:
        return False
    hessian = 2 * inputs.double().T @ inputs.double() / len(inputs)
    if weight.isfinite().all() and weight.any():
        expected = relative_error(weight.double(), result.weight.double(), hessian)
        assert expected > 0
        assert result.error == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert result.error > 0
    assert result.target_error == result.error
    assert 0 <= result.unrefined_error < math.inf
    assert 0 <= result.relative_range <= 1
    assert torch.isfinite(result.weight).all()
    assert result.rank or not result.weight[result.mask].any()
    return True


def test_every_magnitude_gives_correct_results_or_an_error():
    drawn = random.Random(0).sample(MATRIX, 300)
    solved = [check(case, seed) for seed, case in enumerate(drawn)]
    assert 100 < sum(solved) < 300


@pytest.mark.slow
def test_every_magnitude_with_every_option():
    for seed, case in enumerate(MATRIX):
        if seed % 8 == 0:
            check(case, seed)


def test_columns_of_very_different_magnitudes():
    solved = 0
    for seed in range(150):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        weight, inputs = layer(8, 24)
        inputs = inputs * 10.0 ** (draw.choice([3, 8, 15]) * (2 * torch.rand(24) - 1))
        sizes = 10.0 ** (draw.choice([0, 3, 8, 15]) * (2 * torch.rand(24).double() - 1)) * draw.choice([1e-20, 1, 1e20])
        weight = (weight * sizes).to(draw.choice([torch.float32, torch.bfloat16]))
        method = draw.choice(sorted(METHODS))
        refine = 0 if method == "oats" else draw.choice(REFINEMENTS)
        options = {"sparsity": draw.choice(PATTERNS), "ordering": draw.choice(ORDERS), "block_size": 8}
        try:
            result = prune_layer(weight, moments_of(inputs), method=method, refine=refine, **options)
        except REFUSED:
            continue
        solved += 1
        expected = relative_error(weight.double(), result.weight.double(), inputs.double().T @ inputs.double())
        assert result.error == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert 0 <= result.relative_range <= 1
        assert math.isfinite(result.unrefined_error)
    assert solved > 50


@pytest.mark.parametrize("exponent", [-100, -40, 40, 90])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_scaling_the_weight_gives_bitwise_equal_results(method, exponent):
    """The squares of these weights exceed the range of float32."""
    weight, inputs = layer(16, 40, columnar=True)
    inputs[:, 3] = 0
    method = DSnoT(update_threshold=0) if method == "dsnot" else method
    for sparsity, ordering in itertools.product(PATTERNS, ORDERS):
        options = {"method": method, "sparsity": sparsity, "ordering": ordering, "block_size": 8}
        plain = prune_layer(weight, moments_of(inputs), **options)
        found = prune_layer(weight * 2.0**exponent, moments_of(inputs), **options)
        assert torch.equal(found.weight, plain.weight * 2.0**exponent)
        assert torch.equal(found.mask, plain.mask)
        assert torch.equal(found.order, plain.order)
        assert (found.error, found.damping, found.reordered) == (plain.error, plain.damping, plain.reordered)
        assert found.error > 0


def test_dsnot_threshold_applies_to_the_unscaled_weight():
    weight, inputs = layer(16, 40)
    inputs = inputs + torch.randn(40)
    options = {"sparsity": Unstructured(0.5)}
    start = prune_layer(weight, moments_of(inputs), method="wanda", **options).mask
    for exponent, moved in ((-40, False), (40, True)):
        result = prune_layer(weight * 2.0**exponent, moments_of(inputs), method="dsnot", **options)
        assert torch.equal(result.mask, start) != moved
    threshold = DSnoT(update_threshold=500.0)
    scaled = DSnoT(update_threshold=500.0 * 2.0**40)
    plain = prune_layer(weight, moments_of(inputs), method=threshold, **options)
    assert torch.equal(prune_layer(weight * 2.0**40, moments_of(inputs), method=scaled, **options).mask, plain.mask)
    assert not torch.equal(plain.mask, start)


def test_kept_weights_are_bitwise_equal_without_updates():
    weight, inputs = layer(8, 24)
    weight[0, 0], weight[1, 1] = 2.0**-30, 2.0**100
    weight[2] *= 2.0**-140  # subnormal numbers
    result = prune_layer(weight, moments_of(inputs), method="wanda", sparsity=SemiStructured(2, 4))
    assert torch.equal(result.weight, weight.masked_fill(result.mask, 0))


def test_errors_below_float32_rounding_are_computed_in_float64():
    torch.manual_seed(1)
    weight, inputs = layer(8, 24)
    inputs[:, ::2] *= 1e-5  # pruning these columns costs almost nothing
    weight[:, ::2] *= 1e-5
    moments = moments_of(inputs)
    for method in ("wanda", "sparsegpt"):
        result = prune_layer(weight, moments, method=method, sparsity=Unstructured(0.5))
        expected = relative_error(weight.double(), result.weight.double(), moments.hessian().double())
        assert 0 < expected < 1e-12
        assert result.error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("size", "dtype", "message"),
    [
        (
            1e17,
            torch.float32,
            "moments: expected inputs whose Hessian fits float32 .* at most 1.27e.30., got .*; scale .* down",
        ),
        (1e25, torch.float32, "moments: expected finite numbers"),
        (
            1e-17,
            torch.float32,
            "moments: expected inputs whose Hessian fits float32 .* at least 7.89e-31., got .*; scale .* up",
        ),
        (1e-30, torch.float32, "moments: expected inputs whose Hessian fits float32 .* at least 7.89e-31., got .* of 0;"),
        (1e-150, torch.float64, "moments: expected inputs whose Hessian fits float64 .* at least"),
    ],
)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_out_of_range_inputs_raise_an_error(method, size, dtype, message):
    weight, inputs = layer(8, 24)
    moments = moments_of(inputs.double() * size, dtype)
    for of_weight in (weight, weight * 1e-9):
        with pytest.raises(ValueError, match=message):
            prune_layer(of_weight, moments, method=method, sparsity=Unstructured(0.5))


def test_columns_whose_squares_underflow_raise_unless_negligible():
    weight, inputs = layer(8, 24)
    inputs[:, 4] *= 1e-25
    result = prune_layer(weight, moments_of(inputs), sparsity=Unstructured(0.5))
    assert result.dead_columns == 1
    weight[:, 4] *= 1e25
    with pytest.raises(ValueError, match="moments: expected inputs whose squares fit float32, got columns whose squares"):
        prune_layer(weight, moments_of(inputs), sparsity=Unstructured(0.5))
    exact = prune_layer(weight.double(), moments_of(inputs, torch.float64), sparsity=Unstructured(0.5))
    assert exact.dead_columns == 0


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_regression_targets_of_any_magnitude(size):
    weight, inputs = layer(8, 24)
    dense = inputs + 0.1 * torch.randn_like(inputs)
    moments, cross_moments = moments_of(inputs), CrossMoments(24)
    cross_moments.update(inputs, dense)
    options = {"sparsity": Unstructured(0.5), "cross_moments": cross_moments, "target": Target(0.5, 0.0), "refine": 3}
    plain = prune_layer(weight, moments, **options)
    found = prune_layer(weight * size, moments, **options)
    assert (found.mask != plain.mask).sum() <= 2
    assert found.error == pytest.approx(plain.error, rel=1e-2)
    assert found.target_error == pytest.approx(plain.target_error, rel=1e-2)
    assert found.unrefined_error == pytest.approx(plain.unrefined_error, rel=1e-2)
    assert plain.error != plain.target_error


def test_non_finite_regression_target_raises_an_error(monkeypatch):
    weight, inputs = layer(4, 8)
    cross_moments = CrossMoments(8)
    cross_moments.update(inputs, 2 * inputs)
    monkeypatch.setattr(Target, "of", lambda _self, weights, *_: [weight * torch.nan for weight in weights])
    with pytest.raises(ValueError, match="target: expected finite numbers"):
        prune_layer(
            weight, moments_of(inputs), sparsity=Unstructured(0.5), cross_moments=cross_moments, target=Target(0.5, 0.0)
        )


@dataclass(frozen=True)
class Fails(Method):
    """A method whose linear algebra fails below a given damping."""

    below: float

    def prune(self, layer: Layer) -> Solution:
        if layer.curvature.damping < self.below:
            torch.linalg.cholesky(-torch.eye(2))
        mask = layer.sparsity.select(layer.scores("wanda"))
        return Solution(layer.weight.masked_fill(mask, 0), mask, damped=True)


def test_linear_algebra_failure_is_retried_with_more_damping():
    weight, inputs = layer(8, 24)
    options = {"methods": [Fails(0.5), "sparsegpt"], "sparsity": Unstructured(0.5)}
    first, second = prune_layers([weight, weight], moments_of(inputs), **options)
    assert (first.damping, second.damping) == (1, 0.01)
    refined = prune_layers([weight, weight], moments_of(inputs), **options, options=SolverOptions(refine=Refine(3)))
    assert [result.damping for result in refined] == [1, 0.01]
    with pytest.raises(
        NotPositiveDefiniteError, match=r"of 24 columns is not positive definite at damping .*; linalg.cholesky"
    ):
        prune_layer(weight, moments_of(inputs), method=Fails(math.inf), sparsity=Unstructured(0.5))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_low_rank_parts_of_any_magnitude(shape, size):
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = (left[:, :3] * values[:3]) @ right[:3]
    torch.testing.assert_close((low_rank(matrix * size, 3) / size).double(), expected, rtol=1e-3, atol=1e-4)
    assert not low_rank(torch.zeros(shape), 3).any()


@pytest.mark.parametrize("method", METHODS_OF_GROUPS)
def test_structured_pruning_at_any_magnitude(method):
    torch.manual_seed(0)
    weight, inputs = layer(8, 24)
    columns = torch.arange(24).view(6, 4)
    for of_weight, of_inputs, dtype in itertools.product(SIZES, SIZES, DTYPES):
        given = (weight.double() * of_weight).to(dtype)
        scaled = inputs * of_inputs
        try:
            found = prune_groups([GroupedLayer(given, moments_of(scaled), columns)], 2, method=method)
        except REFUSED:
            assert dtype == torch.float16 or not 1e-12 < of_inputs < 1e12
            continue
        if given.any():
            expected = relative_error(given.double(), found.weights[0].double(), scaled.double().T @ scaled.double())
            assert expected > 0
            assert found.errors[0] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    with pytest.raises(ValueError, match="moments: expected inputs whose Hessian fits float32"):
        prune_groups([GroupedLayer(weight, moments_of(inputs * 1e-30), columns)], 2, method=method)


def test_linear_algebra_failure_in_structured_pruning_raises_an_error(monkeypatch):
    weight, inputs = layer(8, 24)

    def fails(*_):
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr(torch.linalg, "solve", fails)
    with pytest.raises(NotPositiveDefiniteError, match="of 24 columns cannot be solved: singular"):
        prune_groups([GroupedLayer(weight, moments_of(inputs), torch.arange(24).view(6, 4))], 2)


@pytest.mark.parametrize("exponent", [-90, 90])
def test_layer_study_at_any_magnitude(exponent):
    weight, inputs = layer(8, 24, columnar=True)
    plain = study_layer(weight, moments_of(inputs), Unstructured(0.5), 8)
    found = study_layer(weight * 2.0**exponent, moments_of(inputs), Unstructured(0.5), 8)
    assert found.cumulative == plain.cumulative
    assert found.reorderings == plain.reorderings
    assert found.heat["natural"][0][0] == pytest.approx(plain.heat["natural"][0][0] * 2.0**exponent, rel=1e-3)
    with pytest.raises(ValueError, match="moments: expected inputs whose Hessian fits float32"):
        study_layer(weight, moments_of(inputs * 1e-30), Unstructured(0.5), 8)


def test_relative_error_never_clamps_nan():
    weight, inputs = layer(8, 24)
    hessian = moments_of(inputs).hessian()
    pruned = weight.masked_fill(weight.abs() < 0.5, 0)
    expected = relative_error(weight, pruned, hessian)
    for size in (1e-30, 1e30):
        assert relative_error(weight * size, pruned * size, hessian) == pytest.approx(expected)
        assert relative_error(weight, pruned, hessian * size) == pytest.approx(expected)
    assert relative_error(torch.zeros(8, 24), torch.zeros(8, 24), hessian) == 0
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"output error fits float64, got an error of (nan|inf)"):
            relative_error(weight, pruned * bad, hessian)


def test_out_of_range_losses_raise_an_error():
    weight, inputs = layer(8, 24)
    mean_square, power = inputs.square().mean(dim=0), (inputs @ weight.T).square().sum(dim=1).mean()
    assert int(loss_histogram(weight, mean_square, power).sum()) == weight.numel()
    for of_weight, of_power in ((1e30, 1.0), (1.0, math.inf), (1.0, math.nan), (1e-30, 1.0)):
        with pytest.raises(ValueError, match="weight, mean_square: expected losses that fit float32, got up to"):
            loss_histogram(weight * of_weight, mean_square, power * of_power)
