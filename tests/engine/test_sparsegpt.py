"""SparseGPT and ROSE against the slow reference in float64, where masks must be identical."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import Ordering, SemiStructured, Unstructured, prune_layer

from .. import reference
from .cases import layer, moments_of

PATTERNS = [
    (Unstructured(0.3), reference.Pattern(share=0.3)),
    (Unstructured(0.7), reference.Pattern(share=0.7)),
    (SemiStructured(2, 4), reference.Pattern(pruned=2, group=4)),
    (SemiStructured(4, 8), reference.Pattern(pruned=4, group=8)),
    (SemiStructured(1, 3), reference.Pattern(pruned=1, group=3)),
    (SemiStructured(3, 5), reference.Pattern(pruned=3, group=5)),
    (SemiStructured(12, 40), reference.Pattern(pruned=12, group=40)),  # wider than one tile of the sweep
]


def compare(weight, result, reference_result):
    expected, mask = reference_result
    assert torch.equal(result.mask, mask)
    assert torch.equal(result.weight == 0, mask | (weight == 0))
    torch.testing.assert_close(result.weight, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("columns", [1, 7, 48, 100, 161])
@pytest.mark.parametrize(("sparsity", "pattern"), PATTERNS, ids=str)
def test_sparsegpt_equals_the_reference(sparsity, pattern, columns):
    weight, inputs = layer(9, columns, dtype=torch.float64)
    moments = moments_of(inputs, torch.float64)
    result = prune_layer(weight, moments, sparsity=sparsity, block_size=48)
    compare(weight, result, reference.sparsegpt(weight, moments.hessian(), pattern, block=48))


@pytest.mark.parametrize("columns", [7, 96, 100])
@pytest.mark.parametrize(("sparsity", "pattern"), PATTERNS, ids=str)
def test_rose_equals_the_reference_at_any_width(sparsity, pattern, columns):
    """If the width is not a multiple of the block size or of M, the narrow block can be anywhere in the order."""
    weight, inputs = layer(9, columns, columnar=True, dtype=torch.float64)
    moments = moments_of(inputs, torch.float64)
    result = prune_layer(weight, moments, sparsity=sparsity, ordering=Ordering.rose(), block_size=32)
    scores = weight.abs() * moments.mean_square().sqrt()
    order, widths, relative_range = reference.rose_order(scores, pattern, 32)
    assert result.relative_range == pytest.approx(relative_range, abs=1e-9)
    assert torch.equal(result.order, order)
    expected = reference.sparsegpt(weight, moments.hessian(), pattern, block=32, order=order, widths=widths)
    compare(weight, result, expected)


def test_narrow_last_block_is_reordered():
    weight, inputs = layer(9, 100, columnar=True)
    result = prune_layer(weight, moments_of(inputs), sparsity=Unstructured(0.5), ordering=Ordering.rose(), block_size=32)
    assert (result.order[:4] >= 96).all()  # the last block has 4 columns, loses most per column and comes first


def test_dead_input_channels_are_pruned_first_and_not_updated():
    weight, inputs = layer(16, 64, dtype=torch.float64)
    inputs[:, [3, 40]] = 0
    result = prune_layer(weight, moments_of(inputs, torch.float64), sparsity=Unstructured(0.5), block_size=32)
    assert result.mask[:, [3, 40]].all()
    few = prune_layer(weight, moments_of(inputs, torch.float64), sparsity=Unstructured(0.01), block_size=32)
    assert few.mask.sum() == 2 * int(16 * 32 * 0.01)
    kept = ~few.mask[:, [3, 40]]
    assert torch.equal(few.weight[:, [3, 40]][kept], weight[:, [3, 40]][kept])


def test_compensation_has_a_lower_error_than_masking_alone():
    weight, inputs = layer(64, 96)
    moments = moments_of(inputs)
    result = prune_layer(weight, moments, sparsity=Unstructured(0.6), block_size=32)
    dropped = weight.masked_fill(result.mask, 0)
    hessian = moments.hessian().double()
    power = lambda v: float(((v.double() @ hessian) * v.double()).sum())  # noqa: E731
    assert power(weight - result.weight) < 0.9 * power(weight - dropped)
    assert result.error == pytest.approx(power(weight - result.weight) / power(weight), rel=1e-3)


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("score", ["wanda", "magnitude", "obs"])
@pytest.mark.parametrize("blocks", ["descending", "ascending", "none"])
@pytest.mark.parametrize("columns", ["descending", "ascending", "none"])
def test_every_ordering_sorts_by_its_losses(columns, blocks, score, threshold):
    weight, inputs = layer(8, 40, columnar=True, dtype=torch.float64)
    moments = moments_of(inputs, torch.float64)
    ordering = Ordering(columns, blocks, threshold, score)
    result = prune_layer(weight, moments, sparsity=Unstructured(0.5), ordering=ordering, block_size=8)
    hessian = moments.hessian()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    scores = {
        "wanda": weight.abs() * moments.mean_square().sqrt(),
        "magnitude": weight.abs(),
        "obs": weight.square() / torch.linalg.inv(damped).diagonal(),
    }[score]
    order = result.order.view(5, 8)
    if threshold is not None and result.relative_range <= threshold:
        assert torch.equal(result.order, torch.arange(40))
        assert not result.reordered
        return
    assert result.reordered == (columns != "none" or blocks != "none")
    assert all(len(set((row // 8).tolist())) == 1 for row in order)  # columns stay in their block
    lost = torch.cat([s * reference.marked(s, 0.5, inclusive=True) for s in scores.split(8, dim=1)], dim=1).sum(dim=0)
    in_order = lost[order]
    for direction, values in [(columns, row) for row in in_order] + [(blocks, in_order.sum(dim=1))]:
        steps = values.diff()
        assert direction == "none" or (steps <= 1e-9).all() == (direction == "descending")
        assert direction == "none" or (steps >= -1e-9).all() == (direction == "ascending")
    if columns == "none":
        assert (order.diff(dim=1) == 1).all()
    if blocks == "none":
        assert torch.equal(order[:, 0] // 8, torch.arange(5))


def test_permuting_the_columns_permutes_the_result():
    """The result depends on the order of the columns unless an ordering by loss restores it."""
    weight, inputs = layer(12, 32, columnar=True, dtype=torch.float64)
    permutation = torch.randperm(32)
    ordering = Ordering("descending", "descending", None, "wanda")
    kwargs = {"sparsity": Unstructured(0.5), "ordering": ordering, "block_size": 32}
    plain = prune_layer(weight, moments_of(inputs, torch.float64), **kwargs)
    moved = prune_layer(weight[:, permutation], moments_of(inputs[:, permutation], torch.float64), **kwargs)
    assert torch.equal(plain.mask[:, permutation], moved.mask)
    torch.testing.assert_close(plain.weight[:, permutation], moved.weight)
