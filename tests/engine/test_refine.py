"""Refinement of pruned layers by least squares and mask iterations."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import Refine, SemiStructured, Unstructured, prune_layer
from rose_exp.engine.refine import conjugate_gradient

from .cases import layer, moments_of


def solve_exactly(weight, mask, hessian):
    """Solve row by row: V_K = W H_{·K} H_{KK}⁻¹."""
    solved = torch.zeros_like(weight)
    for row, gone in enumerate(mask):
        kept = ~gone
        solved[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (weight[row] @ hessian)[kept])
    return solved


@pytest.mark.parametrize("sparsity", [Unstructured(0.6), SemiStructured(2, 4)], ids=str)
def test_many_steps_converge_to_the_least_squares_solution(sparsity):
    weight, inputs = layer(10, 32, dtype=torch.float64)
    moments = moments_of(inputs, torch.float64)
    result = prune_layer(weight, moments, sparsity=sparsity, block_size=16, refine=60)
    expected = solve_exactly(weight, result.mask, moments.hessian())
    torch.testing.assert_close(result.weight, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "dsnot", "sparsegpt"])
def test_every_step_reduces_the_error_and_keeps_the_mask(method):
    weight, inputs = layer(20, 48)
    inputs[:, 7] = 0
    moments = moments_of(inputs)
    results = [
        prune_layer(weight, moments, method=method, sparsity=Unstructured(0.6), block_size=16, refine=steps)
        for steps in (0, 1, 2, 4, 8, 30)
    ]
    errors = [result.error for result in results]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    assert all(torch.equal(result.mask, results[0].mask) for result in results)
    assert all(torch.isfinite(result.weight).all() for result in results)


@pytest.mark.parametrize("sparsity", [Unstructured(0.7), SemiStructured(2, 4), SemiStructured(3, 8)], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_mask_iterations_reduce_the_error_and_keep_the_pattern(method, sparsity):
    torch.manual_seed(2)
    weight, inputs = layer(40, 64)
    inputs[:, 5] = 0
    moments = moments_of(inputs)
    options = {"method": method, "sparsity": sparsity, "block_size": 16}
    fitted = prune_layer(weight, moments, refine=30, **options)
    again = prune_layer(weight, moments, refine=Refine(30, mask_iterations=20), **options)
    assert again.error < 0.9 * fitted.error
    assert again.mask_changes > 0
    assert again.unrefined_error == pytest.approx(prune_layer(weight, moments, **options).error, rel=1e-4)
    assert (again.weight[again.mask] == 0).all()
    assert torch.equal(again.weight[:, 5], torch.where(again.mask[:, 5], 0, weight[:, 5]))  # dead input channel
    if isinstance(sparsity, SemiStructured):
        groups = again.mask.unflatten(1, (-1, sparsity.group)).sum(dim=2)
        assert (groups == sparsity.pruned).all()
    else:
        assert int(again.mask.sum()) == int(weight.numel() * 0.7)


def test_mask_iterations_never_increase_the_error():
    torch.manual_seed(4)
    weight, inputs = layer(16, 32)
    moments = moments_of(inputs)
    hasty = Refine(0, mask_iterations=1, penalty=1e6)  # a single iteration that stays at the pruned weights
    result = prune_layer(weight, moments, sparsity=Unstructured(0.6), block_size=16, refine=hasty)
    plain = prune_layer(weight, moments, sparsity=Unstructured(0.6), block_size=16)
    assert result.error <= plain.error * 1.0001


def test_damping_keeps_the_weights_close_to_the_target():
    torch.manual_seed(6)
    weight, inputs = layer(16, 32, tokens=20)  # fewer tokens than columns: the undamped fit is underdetermined
    moments = moments_of(inputs)
    options = {"sparsity": Unstructured(0.5), "block_size": 16}
    free, held = (prune_layer(weight, moments, refine=Refine(40, damping=d), **options) for d in (0.0, 0.5))
    assert free.error < held.error
    distance = [(weight - r.weight).masked_fill(r.mask, 0).norm() for r in (free, held)]
    assert distance[1] < distance[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps: expected at least 0, got -1"),
        ({"growth": 0.5}, "growth: expected a finite number of at least 1, got 0.5"),
        ({"penalty": 0.0}, "penalty: expected a finite number above 0, got 0.0"),
    ],
)
def test_invalid_options_raise_an_error_that_names_them(options, message):
    with pytest.raises(ValueError, match=message):
        Refine(**options)


@pytest.mark.parametrize("sparsity", [Unstructured(0.0), Unstructured(0.5)], ids=str)
def test_conjugate_gradient_needs_one_step_per_kept_weight(sparsity):
    """With as many steps as kept weights per row, it converges up to rounding from any starting point."""
    torch.manual_seed(7)
    weight, inputs = layer(6, 12, dtype=torch.float64)
    hessian = moments_of(inputs, torch.float64).hessian()
    scale = hessian.diagonal().sqrt()
    mask = sparsity.select_by_row(weight.abs())
    start = torch.randn_like(weight).masked_fill(mask, 0)
    kept = int((~mask[0]).sum())
    found = conjugate_gradient(start * scale, weight * scale, mask, hessian / scale / scale[:, None], kept) / scale
    torch.testing.assert_close(found, solve_exactly(weight, mask, hessian), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("relaxation", [1.0, 1.6])
def test_mask_iterations_match_relaxed_admm(relaxation):
    """In the reference, x minimizes the loss plus the distance to the pruned weights, and the relaxation extrapolates x."""
    torch.manual_seed(6)
    weight, inputs = layer(9, 24, dtype=torch.float64)
    moments = moments_of(inputs, torch.float64)
    how = Refine(0, mask_iterations=5, penalty=0.3, growth=1.5, every=2, relaxation=relaxation)
    sparsity = Unstructured(0.6)
    start = prune_layer(weight, moments, sparsity=sparsity, block_size=8)
    hessian = moments.hessian()
    scale = hessian.diagonal().sqrt()
    normal, wanted = hessian / scale / scale[:, None], weight * scale
    pruned, dual, penalty = start.weight * scale, torch.zeros_like(weight), 0.3
    for iteration in range(5):
        if iteration in (2, 4):
            penalty *= 1.5
        x = torch.linalg.solve(normal + penalty * torch.eye(24).double(), (wanted @ normal - dual + penalty * pruned).T).T
        beyond = relaxation * x + (1 - relaxation) * pruned
        moved = beyond + dual / penalty
        threshold = moved.abs().flatten().kthvalue(int(weight.numel() * 0.6)).values
        pruned = torch.where(moved.abs() <= threshold, 0, moved)
        dual = dual + penalty * (beyond - pruned)
    result = prune_layer(weight, moments, sparsity=sparsity, block_size=8, refine=how)
    assert not result.refinement_rejected
    assert result.mask_changes > 0
    torch.testing.assert_close(result.weight, pruned / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_within_eight_roundings_of_their_output_are_unchanged(dtype):
    """The residual norm is compared with that of H W. H is the identity, so a single step would reach the target."""
    epsilon = torch.finfo(dtype).eps
    target = torch.zeros(4, 3, dtype=dtype)
    target[:, 1] = 1
    start = target.clone()
    start[:, 0] = torch.tensor([7, 7.9, 8.1, 9], dtype=dtype) * epsilon
    mask = torch.zeros(4, 3, dtype=torch.bool)
    found = conjugate_gradient(start, target, mask, torch.eye(3, dtype=dtype), steps=1)
    assert torch.equal(found[:2], start[:2])
    assert torch.equal(found[2:], target[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_stop_when_the_gradient_falls_to_rounding_of_the_first(dtype):
    """The first step reduces the residual to about ``closeness`` times its initial norm. A second step follows only if that
    exceeds the square root of the rounding of the dtype."""
    epsilon = torch.finfo(dtype).eps
    for share, takes_second_step in ((0.5, False), (2.0, True)):
        closeness = share * epsilon**0.5
        hessian = torch.tensor([[1, closeness], [closeness, 1]], dtype=dtype)
        target, start = torch.tensor([[1.0, 0.0]], dtype=dtype), torch.zeros(1, 2, dtype=dtype)
        mask = torch.zeros(1, 2, dtype=torch.bool)
        one, two = (conjugate_gradient(start, target, mask, hessian, steps) for steps in (1, 2))
        remaining = ((target - one) @ hessian).norm() / (target @ hessian).norm()
        assert remaining == pytest.approx(closeness, rel=1e-2)
        assert remaining > 8 * epsilon  # so the limit of eight roundings does not apply
        assert torch.equal(one, two) != takes_second_step
