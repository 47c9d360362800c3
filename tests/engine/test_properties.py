"""Property-based tests with random shapes, dtypes, patterns, orderings and degenerate inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rose_exp.engine import InputMoments, Ordering, SemiStructured, Unstructured, prune_layer, relative_error

PROFILE = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
METHODS = ("magnitude", "wanda", "dsnot", "sparsegpt")
ORDERS = (None, Ordering.rose(), Ordering("ascending", "none", None, "obs"), Ordering("none", "descending", None, "magnitude"))


@st.composite
def layers(draw):
    """Draw a weight, the inputs of its layer, a pattern, an ordering and a block size."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    tokens = draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator)
    kind = draw(st.sampled_from(["plain", "dead", "equal", "low rank", "zero inputs", "zero rows", "one outlier", "sparse"]))
    if kind == "dead":
        inputs[:, torch.rand(columns, generator=generator) < 0.4] = 0
    elif kind == "equal":
        inputs = inputs[:, :1].repeat(1, columns)
    elif kind == "low rank":
        inputs = inputs[:, :2] @ torch.randn(min(2, columns), columns, generator=generator)
    elif kind == "zero inputs":
        inputs = torch.zeros_like(inputs)
    elif kind == "zero rows":
        weight[: rows // 2 + 1] = 0
    elif kind == "one outlier":
        inputs[:, 0] *= 1e3
    elif kind == "sparse":
        weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    groups = [SemiStructured(n, m) for n, m in ((2, 4), (4, 8), (1, 4), (3, 4), (1, 1), (0, 4)) if columns % m == 0]
    sparsity = draw(st.one_of(st.floats(0, 1).map(Unstructured), st.sampled_from(groups)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return weight.to(dtype), inputs, sparsity, draw(st.sampled_from(ORDERS)), draw(st.sampled_from([1, 4, 8, 16, 128]))


def moments_of(inputs, dtype=torch.float32, pieces: int = 1) -> InputMoments:
    moments = InputMoments(inputs.shape[1], dtype=dtype)
    for piece in inputs.tensor_split(pieces):
        moments.update(piece)
    return moments


def prune(method, case, **options):
    weight, inputs, sparsity, ordering, block_size = case
    dtype = torch.promote_types(weight.dtype, torch.float32)
    ordering = ordering if method == "sparsegpt" else None
    arguments = {"method": method, "sparsity": sparsity, "ordering": ordering, "block_size": block_size} | options
    return prune_layer(weight, moments_of(inputs, dtype), **arguments)


@pytest.mark.parametrize("method", METHODS)
@PROFILE
@given(case=layers())
def test_counts_are_exact_and_pruned_weights_are_zero(method, case):
    weight, _, sparsity, _, block_size = case
    before = weight.clone()
    result = prune(method, case)
    assert torch.equal(weight, before)  # not modified in place
    assert (result.weight.shape, result.weight.dtype) == (weight.shape, weight.dtype)
    assert torch.isfinite(result.weight).all()
    assert not result.weight[result.mask].any()
    assert sorted(result.order.tolist()) == list(range(weight.shape[1]))
    rows, columns = weight.shape
    if isinstance(sparsity, SemiStructured):
        grouped = result.mask.view(rows, -1, sparsity.group).sum(-1)
        assert (grouped == sparsity.pruned).all()
    elif method == "magnitude":
        assert int(result.mask.sum()) == int(weight.numel() * sparsity.ratio)
    elif method == "sparsegpt":  # block by block, in pruning order
        in_order = result.mask[:, result.order]
        counts = [int(in_order[:, i : i + block_size].sum()) for i in range(0, columns, block_size)]
        widths = sorted(min(block_size, columns - i) for i in range(0, columns, block_size))
        assert sum(counts) == sum(int(rows * width * sparsity.ratio) for width in widths)
    else:
        assert (result.mask.sum(1) == int(columns * sparsity.ratio)).all()
    if method != "sparsegpt":
        assert torch.equal(result.weight[~result.mask], weight[~result.mask])  # kept weights are not updated


@PROFILE
@given(case=layers())
def test_refined_error_is_at_most_that_of_masking_alone(case):
    """Without refinement, the sweep can be worse because it never revisits a column: in 13 of 4000 draws, by at most 1.67."""
    weight, inputs, *rest = case
    weight = weight.double()
    result = prune("sparsegpt", (weight, inputs, *rest), refine=8)
    hessian = moments_of(inputs, torch.float64).hessian()
    dropped = relative_error(weight, weight.masked_fill(result.mask, 0), hessian)
    assert result.error <= dropped * (1 + 1e-9) + 1e-12
    assert result.error == pytest.approx(relative_error(weight, result.weight, hessian), rel=1e-6, abs=1e-12)
    assert result.error <= prune("sparsegpt", (weight, inputs, *rest)).error * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("method", METHODS)
@PROFILE
@given(case=layers(), seed=st.integers(0, 1000))
def test_permuting_the_rows_permutes_the_result(method, case, seed):
    weight, *rest = case
    assume(bool((rest[0] != 0).any(0).all()))  # dead input channels tie, and ties are broken by position
    weight = (weight.double() + 1e-3 * torch.rand(weight.shape, dtype=torch.float64)).clone()  # no ties
    shuffled = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    one, other = prune(method, (weight, *rest)), prune(method, (weight[shuffled], *rest))
    assert torch.equal(one.mask[shuffled], other.mask)
    torch.testing.assert_close(one.weight[shuffled], other.weight, rtol=1e-6, atol=1e-8)


@PROFILE
@given(case=layers(), pieces=st.integers(1, 9))
def test_moments_do_not_depend_on_the_split_into_batches(case, pieces):
    _, inputs, *_ = case
    one, other = moments_of(inputs, torch.float64), moments_of(inputs, torch.float64, pieces)
    assert (one.tokens, one.weight) == (other.tokens, other.weight)
    torch.testing.assert_close(one.gram, other.gram, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.variance(), other.variance(), rtol=1e-6, atol=1e-6)


@PROFILE
@given(case=layers())
def test_backends_agree(case):
    weight, *rest = case
    case = (weight.float(), *rest)
    one, other = (prune("sparsegpt", case, backend=backend) for backend in ("torch", "numba"))
    assert int(one.mask.sum()) == int(other.mask.sum())
    assert abs(one.error - other.error) <= 1e-3 + 0.02 * one.error  # near-equal scores may be selected differently
