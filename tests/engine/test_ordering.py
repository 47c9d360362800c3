"""Pruning order: the paper's worked example and edge cases of the relative range."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import InputMoments, Ordering, SemiStructured, Unstructured, prune_layer
from rose_exp.engine.ordering import arrange, expected_losses

from .. import reference

FIG_2 = torch.tensor(
    [
        [2.3, 1.2, 1.5, 2.4, 1.5, 1.0, 3.9, 4.6, 4.8],
        [1.4, 1.9, 1.5, 1.8, 0.6, 1.4, 4.8, 4.2, 4.7],
        [2.1, 1.6, 1.1, 2.2, 0.3, 1.1, 6.7, 5.1, 1.9],
        [2.8, 1.0, 2.0, 0.7, 1.1, 1.8, 4.9, 4.8, 1.6],
    ]
)


def test_worked_example_of_the_paper():
    """Fig. 2: blocks of three columns with four pre-pruned entries each."""
    losses = expected_losses(FIG_2.T.contiguous(), Unstructured(0.25), block_size=3)
    torch.testing.assert_close(losses.columns, torch.tensor([1.4, 2.2, 1.1, 0.7, 0.9, 1.0, 3.9, 4.2, 3.5]))
    torch.testing.assert_close(losses.blocks * 3, torch.tensor([4.7, 2.6, 11.6]))
    found = arrange(Ordering.rose(), losses)
    assert (found.order + 1).tolist() == [8, 7, 9, 2, 1, 3, 6, 5, 4]
    assert float(found.relative_range) == pytest.approx((11.6 - 2.6) / 11.6)
    order, _, relative_range = reference.rose_order(FIG_2, reference.Pattern(share=0.25), 3)
    assert torch.equal(order, found.order)
    assert relative_range == pytest.approx(float(found.relative_range))


def test_worked_example_through_prune_layer():
    moments = InputMoments(9)
    moments.update(torch.eye(9))
    result = prune_layer(FIG_2, moments, sparsity=Unstructured(0.25), ordering=Ordering.rose(), block_size=3)
    assert (result.order + 1).tolist() == [8, 7, 9, 2, 1, 3, 6, 5, 4]
    assert result.reordered


def test_narrow_last_block_does_not_count_as_columnar():
    """All columns are equal, but sums of losses over blocks depend on the width of the block."""
    losses = expected_losses(torch.ones(5 * 8 + 2, 4), Unstructured(0.5), block_size=8)
    assert float(losses.relative_range) == pytest.approx(0)


def test_groups_of_a_semi_structured_pattern_are_the_blocks():
    scores = torch.arange(1, 13, dtype=torch.float32)[:, None].repeat(1, 3)
    losses = expected_losses(scores, SemiStructured(2, 4), block_size=128)
    assert losses.columns.tolist() == [3, 6, 0, 0, 15, 18, 0, 0, 27, 30, 0, 0]
    assert arrange(Ordering.rose(), losses).order.tolist() == [9, 8, 10, 11, 5, 4, 6, 7, 1, 0, 2, 3]


def test_zero_losses_are_not_columnar():
    losses = expected_losses(torch.zeros(16, 4), Unstructured(0.5), block_size=4)
    found = arrange(Ordering.rose(), losses)
    assert float(found.relative_range) == 0
    assert found.order.tolist() == list(range(16))


def test_threshold_is_strict():
    scores = torch.tensor([[1.0], [1.0], [2.0], [2.0]])
    losses = expected_losses(scores, Unstructured(1.0), block_size=2)
    assert float(losses.relative_range) == 0.5
    assert not arrange(Ordering(threshold=0.5), losses).reordered
    assert arrange(Ordering(threshold=0.499), losses).order.tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": "down"}, "columns: expected one of descending, ascending, none, got 'down'"),
        ({"score": "taylor"}, "score: expected one of magnitude, obs, wanda, got 'taylor'"),
        ({"threshold": 1.5}, "threshold: expected a number from 0 to 1 or None, got 1.5"),
    ],
)
def test_invalid_options_raise_an_error_that_names_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ordering(**arguments)
