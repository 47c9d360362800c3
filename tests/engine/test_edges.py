"""Degenerate layers, dtypes, exact counts and invalid arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rose_exp.engine import (
    METHODS,
    DSnoT,
    InputMoments,
    NotPositiveDefiniteError,
    Ordering,
    SemiStructured,
    Unstructured,
    prune_layer,
)
from rose_exp.engine.hessian import dampings, factorize

from .cases import layer, moments_of

ALL = sorted(METHODS)
PATTERNS = [Unstructured(0.5), SemiStructured(2, 4), SemiStructured(3, 7)]


def expected_count(method: str, sparsity, rows: int, columns: int, block: int) -> int:
    if isinstance(sparsity, SemiStructured):
        narrow = columns % sparsity.group
        return rows * (columns // sparsity.group * sparsity.pruned + narrow * sparsity.pruned // sparsity.group)
    if method in ("magnitude", "alps"):
        return int(rows * columns * sparsity.ratio)
    if method == "oats" and sparsity.ratio > 0:  # the low-rank part takes a quarter of the budget
        return rows * int(columns * (1 - 0.75 * (1 - sparsity.ratio)))
    if method in ("wanda", "dsnot", "oats"):
        return rows * int(columns * sparsity.ratio)
    widths = [min(block, columns - start) for start in range(0, columns, block)]
    return sum(int(rows * width * sparsity.ratio) for width in widths)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_counts_are_exact_and_pruned_weights_are_zero(data):
    method = data.draw(st.sampled_from(ALL))
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    block = data.draw(st.integers(1, 48))
    group = data.draw(st.integers(1, 24))
    sparsity = data.draw(
        st.one_of(
            st.builds(Unstructured, st.floats(0, 1)),
            st.builds(SemiStructured, st.integers(0, group), st.just(group)),
        )
    )
    direction = st.sampled_from(["descending", "ascending", "none"])
    threshold = st.sampled_from([None, 0.5])
    score = st.sampled_from(["wanda", "obs", "magnitude"])
    ordering = data.draw(st.one_of(st.none(), st.builds(Ordering, direction, direction, threshold, score)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weight, inputs = layer(rows, columns, tokens=data.draw(st.integers(1, 60)))
    weight[data.draw(st.integers(0, rows - 1))] = 0
    inputs[:, data.draw(st.integers(0, columns - 1))] = 0
    before = weight.clone()
    result = prune_layer(weight, moments_of(inputs), method=method, sparsity=sparsity, ordering=ordering, block_size=block)
    assert torch.equal(weight, before)
    assert int(result.mask.sum()) == expected_count(method, sparsity, rows, columns, block)
    assert result.rank or (result.weight[result.mask] == 0).all()
    assert torch.equal(result.order.sort().values, torch.arange(columns))
    assert 0 <= result.relative_range <= 1
    assert torch.isfinite(result.weight).all()
    if isinstance(sparsity, SemiStructured):
        whole = columns - columns % group
        assert (result.mask[:, :whole].unflatten(1, (-1, group)).sum(dim=2) == sparsity.pruned).all()


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("sparsity", [Unstructured(0.0), SemiStructured(0, 4)])
def test_sparsity_0_leaves_the_layer_unchanged(method, sparsity):
    weight, inputs = layer(8, 20)
    inputs[:, 3] = 0
    result = prune_layer(weight, moments_of(inputs), method=method, sparsity=sparsity, ordering=Ordering.rose())
    assert torch.equal(result.weight, weight)
    assert not result.mask.any()
    assert result.error == 0


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("sparsity", [Unstructured(1.0), SemiStructured(4, 4)])
def test_sparsity_1_prunes_every_weight(method, sparsity):
    weight, inputs = layer(8, 20)
    result = prune_layer(weight, moments_of(inputs), method=method, sparsity=sparsity, ordering=Ordering.rose())
    assert not result.weight.any()
    assert result.mask.all()
    assert result.error == pytest.approx(1)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
def test_single_column_and_all_zero_inputs(method, sparsity):
    weight, inputs = layer(6, 1)
    one = prune_layer(weight, moments_of(inputs), method=method, sparsity=sparsity, ordering=Ordering.rose())
    assert one.weight.shape == (6, 1)
    weight, inputs = layer(6, 21)
    silent = prune_layer(weight, moments_of(torch.zeros_like(inputs)), method=method, sparsity=sparsity)
    assert int(silent.mask.sum()) == expected_count(method, sparsity, 6, 21, 128)
    assert torch.equal(silent.weight[~silent.mask], weight[~silent.mask])
    assert silent.error == 0


def test_ties_prune_the_first_weights():
    weight = torch.ones(2, 8)
    moments = InputMoments(8)
    moments.update(torch.eye(8))
    for method in ("magnitude", "wanda", DSnoT(max_cycles=0), "sparsegpt"):
        result = prune_layer(weight, moments, method=method, sparsity=SemiStructured(2, 4))
        assert result.mask[0].tolist() == [True, True, False, False] * 2, method
    assert prune_layer(weight, moments, method="magnitude", sparsity=Unstructured(0.5)).mask[0].all()
    assert prune_layer(weight, moments, method="sparsegpt", sparsity=Unstructured(0.5)).mask[0].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ALL)
def test_weight_dtype_is_preserved(method, dtype):
    weight, inputs = layer(16, 40, dtype=dtype)
    result = prune_layer(weight, moments_of(inputs.to(dtype)), method=method, sparsity=Unstructured(0.5), block_size=16)
    assert result.weight.dtype == dtype
    exact = prune_layer(weight.float(), moments_of(inputs.to(dtype)), method=method, sparsity=Unstructured(0.5), block_size=16)
    torch.testing.assert_close(result.weight, exact.weight.to(dtype), rtol=1e-5, atol=1e-6)
    assert torch.equal(result.mask, exact.mask)


def test_result_that_overflows_float16_raises_an_error():
    weight, inputs = layer(4, 16)
    inputs = inputs[:, :1] * torch.linspace(1, 4, 16) + 1e-3 * inputs  # nearly collinear inputs cause large updates
    weight = torch.full((4, 16), 60000.0).half()
    with pytest.raises(ValueError, match="does not fit float16"):
        prune_layer(weight, moments_of(inputs), sparsity=Unstructured(0.5), damping=1e-6)


def test_damping_increases_by_factors_of_ten_and_is_reported():
    """A single token gives a Hessian of rank 1, which cannot be factorized without damping."""
    weight, inputs = layer(4, 16, tokens=1)
    result = prune_layer(weight, moments_of(inputs), sparsity=Unstructured(0.5), damping=0.0)
    assert result.damping >= 1e-4
    assert result.damping == pytest.approx(10 ** round(torch.tensor(result.damping).log10().item()))
    enough = prune_layer(weight, moments_of(inputs), sparsity=Unstructured(0.5), damping=0.01)
    assert enough.damping == 0.01


def test_zero_damping_is_retried_from_1e_minus_4():
    assert dampings(0.0) == pytest.approx([0, 1e-4, 1e-3, 1e-2, 1e-1])
    assert dampings(0.02) == pytest.approx([0.02, 0.2, 2, 20, 200])
    weight, inputs = layer(4, 16, tokens=8, dtype=torch.float64)
    result = prune_layer(weight, moments_of(inputs, torch.float64), sparsity=Unstructured(0.5), damping=0.0)
    assert result.damping == 1e-4


def test_indefinite_hessian_raises_an_error():
    moments = InputMoments(4)
    moments.update(torch.eye(4))
    moments.gram[0, 1] = moments.gram[1, 0] = 1e9
    with pytest.raises(
        NotPositiveDefiniteError, match="of 4 columns is not positive definite at damping 0.01, 0.1, 1, 10, 100"
    ):
        prune_layer(torch.ones(2, 4), moments, sparsity=Unstructured(0.5))


@pytest.mark.parametrize("columns", [1, 30, 700, 1300])
def test_factor_is_the_cholesky_factor_of_the_damped_inverse(columns):
    """Large Hessians are factorized in halves; the lower triangle is never read."""
    _, inputs = layer(1, columns, dtype=torch.float64)
    hessian = moments_of(inputs, torch.float64).hessian()
    found = factorize(hessian.triu(), 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(columns)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(found.upper, expected)
    torch.testing.assert_close(found.inverse_diagonal(), torch.linalg.inv(damped).diagonal())
    assert not found.failed
    assert float(found.shift) == pytest.approx(0.05 * float(hessian.diagonal().mean()))


def test_failed_factorization_is_flagged():
    for place in (0, 699):
        broken = torch.eye(700)
        broken[place, place] = -1
        assert factorize(broken, 0.0).failed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "obs"}, "method: expected one of alps, dsnot, magnitude, oats, sparsegpt, wanda, got 'obs'"),
        ({"weight": torch.ones(3)}, r"weight: expected shape \(rows, columns\), neither 0, got \(3,\)"),
        ({"weight": torch.ones(3, 5, dtype=torch.int64)}, "weight: expected a floating type, got torch.int64"),
        ({"weight": torch.ones(3, 6)}, "moments: expected 6 columns, as the weight has, got 5"),
        ({"weight": torch.full((3, 5), torch.nan)}, "weight: expected finite numbers"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"damping": -1.0}, "damping: expected a finite number of at least 0, got -1.0"),
        ({"refine": -1}, "steps: expected at least 0, got -1"),
    ],
)
def test_invalid_arguments_raise_an_error(change, message):
    arguments = {"weight": torch.ones(3, 5), "moments": InputMoments(5), "sparsity": Unstructured(0.5)} | change
    with pytest.raises(ValueError, match=message):
        prune_layer(arguments.pop("weight"), arguments.pop("moments"), **arguments)


def test_non_finite_moments_raise_an_error():
    moments = InputMoments(5)
    moments.update(torch.tensor([1.0, 2.0, torch.inf, 0.0, 0.0]))
    with pytest.raises(ValueError, match="moments: expected finite numbers"):
        prune_layer(torch.ones(3, 5), moments, sparsity=Unstructured(0.5))


@pytest.mark.parametrize(("pruned", "group"), [(5, 4), (-1, 4), (0, 0)])
def test_invalid_patterns_raise_an_error(pruned, group):
    with pytest.raises(ValueError, match="expected"):
        SemiStructured(pruned, group)
    with pytest.raises(ValueError, match="ratio: expected a number from 0 to 1, got 1.2"):
        Unstructured(1.2)
