"""Joint pruning of layers that share their inputs, and the errors that it reports."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import (
    NotPositiveDefiniteError,
    Ordering,
    SemiStructured,
    SolverOptions,
    Unstructured,
    Wanda,
    prune_layer,
    prune_layers,
    relative_error,
)
from rose_exp.engine.selection import lost_by_rank, lost_by_threshold

from .cases import layer, moments_of

PATTERNS = [Unstructured(0.6), SemiStructured(2, 4)]


@pytest.mark.parametrize("ordering", [None, Ordering.rose(), Ordering(threshold=None)], ids=str)
@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
def test_pruning_layers_jointly_equals_pruning_them_separately(sparsity, ordering):
    first, inputs = layer(20, 100, columnar=True)
    weights = [first, first[:3] * torch.linspace(0.01, 1, 100), torch.randn(50, 100)]
    methods = ["sparsegpt", Wanda(), "sparsegpt"]
    options = {"ordering": ordering, "block_size": 32}
    together = prune_layers(weights, moments_of(inputs), methods=methods, sparsity=sparsity, options=SolverOptions(**options))
    for weight, method, found in zip(weights, methods, together, strict=True):
        alone = prune_layer(weight, moments_of(inputs), method=method, sparsity=sparsity, **options)
        assert torch.equal(found.weight, alone.weight)
        assert torch.equal(found.mask, alone.mask)
        assert torch.equal(found.order, alone.order)
        assert (found.error, found.reordered, found.damping) == (alone.error, alone.reordered, alone.damping)


def test_moments_can_be_reused_for_several_sparsities():
    weight, inputs = layer(20, 64)
    moments = moments_of(inputs)
    before = moments.gram.clone()
    errors = [prune_layer(weight, moments, sparsity=Unstructured(share)).error for share in (0.3, 0.5, 0.7)]
    assert errors == sorted(errors)
    assert torch.equal(moments.gram, before)
    assert prune_layer(weight, moments, sparsity=Unstructured(0.3)).error == errors[0]


def test_only_failed_layers_are_retried_with_more_damping():
    """The Hessian has rank 1: without damping the sweep fails, but Wanda needs no factor."""
    weight, inputs = layer(8, 16, tokens=1)
    methods, options = ["wanda", "sparsegpt"], SolverOptions(damping=0.0)
    wanda, swept = prune_layers(
        [weight, weight], moments_of(inputs), methods=methods, sparsity=Unstructured(0.5), options=options
    )
    assert wanda.damping == 0
    assert swept.damping >= 1e-4


def test_invalid_groups_raise_an_error():
    weight, inputs = layer(8, 16)
    with pytest.raises(ValueError, match="methods: expected one for each of at least one weight, got 1 for 2"):
        prune_layers([weight, weight], moments_of(inputs), methods=["wanda"], sparsity=Unstructured(0.5))
    broken = moments_of(torch.eye(16))
    broken.gram[0, 1] = broken.gram[1, 0] = 1e9
    with pytest.raises(NotPositiveDefiniteError):
        prune_layers([weight], broken, methods=["sparsegpt"], sparsity=Unstructured(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("refine", [0, 3])
def test_reported_error_is_that_of_the_returned_weight(sparsity, damping, dtype, refine):
    """The losses of the sweep sum to the error of its result, excluding damping and dead input channels."""
    weight, inputs = layer(40, 96, tokens=70, columnar=True)
    inputs[:, [5, 60]] = 0
    moments = moments_of(inputs, torch.promote_types(dtype, torch.float32))
    options = {"damping": damping, "ordering": Ordering(threshold=None), "block_size": 32, "refine": refine}
    result = prune_layer(weight.to(dtype), moments, sparsity=sparsity, **options)
    expected = relative_error(weight.to(dtype).double(), result.weight.double(), moments.hessian().double())
    assert result.error == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_single_row_or_column_is_not_modified_in_place(shape):
    weight, moments = torch.randn(shape), moments_of(torch.randn(30, shape[1]))
    before = weight.clone()
    prune_layer(weight, moments, sparsity=Unstructured(0.5))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("count", [lambda n: n // 3, lambda _: 0, lambda n: n], ids=["third", "none", "all"])
@pytest.mark.parametrize("width", [3, 8, 50])
def test_kernels_compute_the_same_expected_losses_as_torch(width, count):
    scores = (torch.randn(50, 30).abs() * 8).round() / 8  # with ties
    for lost in (lost_by_threshold, lost_by_rank):
        torch.testing.assert_close(lost(scores, width, count).double(), lost(scores.double(), width, count))


def test_expected_losses_of_scores_that_are_not_contiguous():
    scores = torch.rand(30, 50).T
    for lost in (lost_by_threshold, lost_by_rank):
        assert torch.equal(lost(scores, 8, lambda n: n // 3), lost(scores.contiguous(), 8, lambda n: n // 3))
