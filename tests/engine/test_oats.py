"""OATS against its definition written out with whole singular value decompositions."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import SemiStructured, Unstructured, prune_layer
from rose_exp.engine.methods import OATS

from .cases import layer, moments_of


def alternated(weight, inputs, rank, kept_a_row, iterations):
    """OATS of unstructured sparsity in float64, row by row."""
    scale = inputs.double().square().mean(dim=0).sqrt()
    scaled = weight.double() * scale
    sparse = torch.zeros_like(scaled)
    for _ in range(iterations):
        left, values, right = torch.linalg.svd(scaled - sparse, full_matrices=False)
        values[rank:] = 0
        low = left @ torch.diag(values) @ right
        sparse = torch.zeros_like(scaled)
        for row in range(len(scaled)):
            for column in (scaled - low)[row].abs().argsort(descending=True)[:kept_a_row]:
                sparse[row, column] = (scaled - low)[row, column]
    return (sparse + low) / scale, sparse == 0


@pytest.mark.parametrize(("rows", "columns"), [(20, 32), (40, 24)])
def test_it_alternates_as_its_authors_do(rows, columns):
    weight, inputs = layer(rows, columns, columnar=True)
    kept = 0.4 * 0.75
    result = prune_layer(weight, moments_of(inputs), method=OATS(iterations=7), sparsity=Unstructured(0.6))
    assert result.rank == int(0.25 * 0.4 * rows * columns / (rows + columns)) > 0
    expected, mask = alternated(weight, inputs, result.rank, columns - int(columns * (1 - kept)), 7)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_both_parts_together_are_as_many_numbers_as_the_sparsity_says():
    weight, inputs = layer(96, 160)
    result = prune_layer(weight, moments_of(inputs), method="oats", sparsity=Unstructured(0.5))
    assert result.stored / weight.numel() == pytest.approx(0.5, abs=0.01)
    assert (result.weight != 0).all()


def test_more_steps_bring_the_error_down_and_beat_wanda():
    weight, inputs = layer(64, 64)
    weight = weight + 3 * torch.randn(64, 2) @ torch.randn(2, 64)  # something of low rank to find
    errors = [
        prune_layer(weight, moments_of(inputs), method=OATS(iterations=n), sparsity=Unstructured(0.6)).error for n in (1, 40)
    ]
    wanda = prune_layer(weight, moments_of(inputs), method="wanda", sparsity=Unstructured(0.6)).error
    assert errors[1] < errors[0] < wanda


def test_without_a_low_rank_part_it_is_wanda():
    weight, inputs = layer(12, 40)
    oats = prune_layer(weight, moments_of(inputs), method=OATS(rank_ratio=0), sparsity=Unstructured(0.5))
    wanda = prune_layer(weight, moments_of(inputs), method="wanda", sparsity=Unstructured(0.5))
    assert torch.equal(oats.mask, wanda.mask)
    torch.testing.assert_close(oats.weight, wanda.weight)


def test_groups_are_kept_in_the_sparse_part_and_the_low_rank_part_comes_on_top():
    weight, inputs = layer(64, 64)
    result = prune_layer(weight, moments_of(inputs), method="oats", sparsity=SemiStructured(2, 4))
    assert (result.mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()
    assert result.rank == int(0.25 * (0.5 / 0.75) * 32)
    assert result.stored > weight.numel() / 2


def test_dead_inputs_get_zeros():
    weight, inputs = layer(16, 24)
    inputs[:, 5] = 0
    result = prune_layer(weight, moments_of(inputs), method="oats", sparsity=Unstructured(0.5))
    assert (result.weight[:, 5] == 0).all()
    assert torch.isfinite(result.weight).all()


def test_nothing_is_refined():
    weight, inputs = layer(16, 24)
    with pytest.raises(ValueError, match="refine: expected 0 where a low-rank part is added"):
        prune_layer(weight, moments_of(inputs), method="oats", sparsity=Unstructured(0.5), refine=2)


@pytest.mark.parametrize("options", [{"rank_ratio": 1}, {"rank_ratio": -0.1}, {"iterations": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OATS(**options)
