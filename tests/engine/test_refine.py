"""Least squares on a fixed mask."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import SemiStructured, Unstructured, prune_layer

from .cases import layer, moments_of


def solve_exactly(weight, mask, hessian):
    """Row by row: V_K = W H_{·K} H_{KK}⁻¹."""
    solved = torch.zeros_like(weight)
    for row, gone in enumerate(mask):
        kept = ~gone
        solved[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (weight[row] @ hessian)[kept])
    return solved


@pytest.mark.parametrize("sparsity", [Unstructured(0.6), SemiStructured(2, 4)], ids=str)
def test_many_steps_reach_the_least_squares_solution(sparsity):
    weight, inputs = layer(10, 32, dtype=torch.float64)
    moments = moments_of(inputs, torch.float64)
    result = prune_layer(weight, moments, sparsity=sparsity, block_size=16, refine=60)
    expected = solve_exactly(weight, result.mask, moments.hessian())
    torch.testing.assert_close(result.weight, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "dsnot", "sparsegpt"])
def test_every_step_lowers_the_error_and_keeps_the_mask(method):
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
