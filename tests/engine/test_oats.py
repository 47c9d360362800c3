"""OATS against its definition with full singular value decompositions."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import SemiStructured, Unstructured, prune_layer
from rose_exp.engine.methods import OATS

from .cases import layer, moments_of


def alternated(weight, inputs, rank, kept_a_row, iterations):
    """Reference for unstructured OATS in float64, row by row."""
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
def test_oats_matches_the_reference(rows, columns):
    weight, inputs = layer(rows, columns, columnar=True)
    kept = 0.4 * 0.75
    result = prune_layer(weight, moments_of(inputs), method=OATS(iterations=7), sparsity=Unstructured(0.6))
    assert result.rank == int(0.25 * 0.4 * rows * columns / (rows + columns)) > 0
    expected, mask = alternated(weight, inputs, result.rank, columns - int(columns * (1 - kept)), 7)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_stored_numbers_of_both_parts_match_the_sparsity():
    weight, inputs = layer(96, 160)
    result = prune_layer(weight, moments_of(inputs), method="oats", sparsity=Unstructured(0.5))
    assert result.stored / weight.numel() == pytest.approx(0.5, abs=0.01)
    assert (result.weight != 0).all()


def test_more_iterations_reduce_the_error_below_that_of_wanda():
    weight, inputs = layer(64, 64)
    weight = weight + 3 * torch.randn(64, 2) @ torch.randn(2, 64)  # add a low-rank component
    errors = [
        prune_layer(weight, moments_of(inputs), method=OATS(iterations=n), sparsity=Unstructured(0.6)).error for n in (1, 40)
    ]
    wanda = prune_layer(weight, moments_of(inputs), method="wanda", sparsity=Unstructured(0.6)).error
    assert errors[1] < errors[0] < wanda


def test_oats_without_a_low_rank_part_equals_wanda():
    weight, inputs = layer(12, 40)
    oats = prune_layer(weight, moments_of(inputs), method=OATS(rank_ratio=0), sparsity=Unstructured(0.5))
    wanda = prune_layer(weight, moments_of(inputs), method="wanda", sparsity=Unstructured(0.5))
    assert torch.equal(oats.mask, wanda.mask)
    torch.testing.assert_close(oats.weight, wanda.weight)


def test_sparse_part_keeps_the_pattern_and_low_rank_part_is_extra():
    weight, inputs = layer(64, 64)
    result = prune_layer(weight, moments_of(inputs), method="oats", sparsity=SemiStructured(2, 4))
    assert (result.mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()
    assert result.rank == int(0.25 * (0.5 / 0.75) * 32)
    assert result.stored > weight.numel() / 2


def test_weights_of_dead_input_channels_are_zero():
    weight, inputs = layer(16, 24)
    inputs[:, 5] = 0
    result = prune_layer(weight, moments_of(inputs), method="oats", sparsity=Unstructured(0.5))
    assert (result.weight[:, 5] == 0).all()
    assert torch.isfinite(result.weight).all()


def test_refinement_of_oats_raises_an_error():
    weight, inputs = layer(16, 24)
    with pytest.raises(ValueError, match="refine: expected 0 where a low-rank part is added"):
        prune_layer(weight, moments_of(inputs), method="oats", sparsity=Unstructured(0.5), refine=2)


@pytest.mark.parametrize("options", [{"rank_ratio": 1}, {"rank_ratio": -0.1}, {"iterations": 0}])
def test_invalid_options_raise_an_error_that_names_them(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OATS(**options)
