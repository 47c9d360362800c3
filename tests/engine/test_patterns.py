"""Sparsity as a number or text, in every function that takes one."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import InputMoments, SemiStructured, SparseGPT, Unstructured, prune_layer, prune_layers
from rose_exp.engine.patterns import as_sparsity
from rose_exp.pruning import PruningPlan

PATTERNS = [
    (0.7, Unstructured(0.7)),
    ("0.7", Unstructured(0.7)),
    (0, Unstructured(0.0)),
    (1, Unstructured(1.0)),
    ("2:4", SemiStructured(2, 4)),
    ("1:8", SemiStructured(1, 8)),
    (SemiStructured(4, 8), SemiStructured(4, 8)),
]


@pytest.mark.parametrize(("value", "pattern"), PATTERNS)
def test_numbers_and_text_are_patterns_in_every_function(value, pattern):
    moments = InputMoments(16)
    moments.update(torch.randn(64, 16))
    weight = torch.randn(8, 16)
    expected = prune_layer(weight, moments, sparsity=pattern).weight
    assert as_sparsity(value) == pattern
    assert torch.equal(prune_layer(weight, moments, sparsity=value).weight, expected)
    for sparsity in (value, [value]):
        assert torch.equal(prune_layers([weight], moments, methods=["sparsegpt"], sparsity=sparsity)[0].weight, expected)
    assert PruningPlan(SparseGPT(), value).sparsity == pattern


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        *((70, "got 70; did you mean 0.7?"), ("50", "got '50'; did you mean 0.5?"), (1.7, "got 1.7$"), (101, "got 101$")),
        *((-0.1, "got -0.1$"), ("2:", "got '2:'$"), (True, "got True$"), (None, "got None$"), ("nan", "got 'nan'$")),
    ],
)
def test_other_values_are_rejected(value, hint):
    with pytest.raises(
        ValueError,
        match=f"sparsity: expected a ratio from 0 to 1, a pattern such as 2:4 or an object, {hint}".replace("?", "[?]"),
    ):
        as_sparsity(value)


def test_impossible_patterns_are_rejected():
    with pytest.raises(ValueError, match="pruned: expected 0 to 2"):
        as_sparsity("4:2")
