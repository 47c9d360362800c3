"""ALPS against a slow reference that follows the paper and solves each linear system directly."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import ALPS, SemiStructured, Unstructured, prune_layer

from ..reference import marked, marked_in_groups
from .cases import layer, moments_of
from .test_refine import solve_exactly


def reference(weight, hessian, sparsity, damping=0.01, penalty=0.1, limit=300, settled=0.0003, least=30):
    """Return the mask found by ADMM, the damped Hessian and the number of iterations."""

    def choose(scores):
        if isinstance(sparsity, Unstructured):
            return marked(scores, sparsity.ratio, inclusive=False)
        return marked_in_groups(scores, sparsity.pruned, sparsity.group)

    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    norms = damped.diagonal().sqrt()
    correlation = damped / torch.outer(norms, norms)
    dense = weight * norms
    mask_before = choose(dense.abs())
    first = torch.where(mask_before, 0, dense)
    fitted, pruned, dual, ever_changed = dense, first, torch.zeros_like(dense), False
    kept = int((~mask_before).sum())
    for iteration in range(limit):
        system = correlation + penalty * torch.eye(len(hessian), dtype=hessian.dtype)
        fitted = torch.linalg.solve(system, (dense @ correlation - dual + penalty * pruned).T).T
        mask = choose((fitted + dual / penalty).abs())
        pruned = torch.where(mask, 0, fitted + dual / penalty)
        dual = dual + penalty * (fitted - pruned)
        if iteration % 3 == 2:
            changed = int((mask ^ mask_before).sum())
            mask_before = mask
            if changed > 0.1 * kept:
                penalty, ever_changed = penalty * 1.3, True
            elif changed > 0.005 * kept:
                penalty, ever_changed = penalty * 1.2, True
            elif changed > 0 and ever_changed:
                penalty = penalty * 1.1
            elif changed > 0:
                penalty, fitted, pruned, dual = penalty / 5, dense, first, torch.zeros_like(dense)
            elif ever_changed:
                break
            else:
                penalty = penalty / 5
            if iteration >= least and changed < settled * kept:
                break
    return choose(fitted.abs()), damped, iteration + 1


@pytest.mark.parametrize(
    "sparsity", [Unstructured(0.7), Unstructured(0.5), SemiStructured(2, 4), SemiStructured(4, 8)], ids=str
)
@pytest.mark.parametrize("columnar", [False, True])
def test_alps_matches_the_reference(sparsity, columnar):
    torch.manual_seed(3)
    weight, inputs = layer(12, 32, columnar=columnar, dtype=torch.float64)
    moments = moments_of(inputs, torch.float64)
    mask, damped, iterations = reference(weight, moments.hessian(), sparsity)
    assert iterations > 6
    result = prune_layer(weight, moments, method=ALPS(steps=200), sparsity=sparsity)
    assert torch.equal(result.mask, mask)
    best = solve_exactly(weight, mask, damped)
    losses = [float(((weight - v) @ damped * (weight - v)).sum()) for v in (result.weight, best)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # conjugate gradient stops at a residual of 1e-4
    torch.testing.assert_close(result.weight, best, rtol=1e-2, atol=1e-2)
    assert result.damping == 0.01


@pytest.mark.parametrize("least", [1, 7, 11])
def test_alps_stops_when_the_mask_settles_after_min_iterations(least):
    torch.manual_seed(8)
    weight, inputs = layer(20, 40, dtype=torch.float64)
    moments, sparsity = moments_of(inputs, torch.float64), Unstructured(0.6)
    mask, _, iterations = reference(weight, moments.hessian(), sparsity, settled=0.99, least=least)
    assert iterations == 3 * (least // 3 + 1)
    method = ALPS(tolerance=0.99, min_iterations=least, steps=0)
    assert torch.equal(prune_layer(weight, moments, method=method, sparsity=sparsity).mask, mask)
    later = reference(weight, moments.hessian(), sparsity, settled=0.99, least=least + 4)[0]
    assert not torch.equal(later, mask)  # otherwise the test would not detect a late stop


@pytest.mark.parametrize("sparsity", [Unstructured(0.7), SemiStructured(2, 4)], ids=str)
def test_alps_has_a_lower_error_than_sparsegpt(sparsity):
    torch.manual_seed(5)
    weight, inputs = layer(48, 96)
    moments = moments_of(inputs)
    alps, sparsegpt = (prune_layer(weight, moments, method=m, sparsity=sparsity, block_size=32) for m in ("alps", "sparsegpt"))
    assert alps.error < 0.8 * sparsegpt.error
    assert int(alps.mask.sum()) == int(weight.numel() * sparsity.ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0.0}, "penalty: expected a finite number above 0, got 0.0"),
        ({"check_every": 0}, "check_every: expected at least 1, got 0"),
        ({"steps": -1}, "steps: expected at least 0, got -1"),
    ],
)
def test_invalid_options_raise_an_error_that_names_them(options, message):
    with pytest.raises(ValueError, match=message):
        ALPS(**options)
