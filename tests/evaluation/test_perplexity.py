"""Perplexity compared with its definition."""

from __future__ import annotations

import math

import pytest
import torch

from rose_exp.evaluation import perplexity
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.ranks import Ranks

from ..models.families import build, tokens


def test_perplexity_matches_its_definition():
    model, windows = build("llama").double(), tokens(5, 20)
    with torch.no_grad():
        logits = model(windows).logits
    total = 0.0
    for window, scores in zip(windows, logits, strict=True):
        log_probabilities = scores.log_softmax(dim=-1)
        total -= sum(float(log_probabilities[i - 1, window[i]]) for i in range(1, 20)) / 19
    assert perplexity(model, windows).value == pytest.approx(math.exp(total / 5), rel=1e-5)


def test_perplexity_is_independent_of_the_batch_size():
    model, windows = build("gemma3"), tokens(5, 20)
    assert perplexity(model, windows, batch=1).value == pytest.approx(perplexity(model, windows, batch=4).value, rel=1e-5)


def test_standard_error_is_computed_over_windows():
    model, windows = build("llama").double(), tokens(6, 20)
    found = perplexity(model, windows)
    means = torch.tensor([math.log(perplexity(model, window[None]).value) for window in windows])
    assert found.standard_error == pytest.approx(found.value * float(means.std()) / 6**0.5, rel=1e-5)
    assert perplexity(model, windows[:1]).standard_error == 0


def test_rank_without_windows_uses_the_gathered_values():
    ranks = Ranks()
    ranks.share = lambda windows: windows[:0]
    ranks.gather = lambda own: [[1.5], own]
    assert perplexity(build("llama"), tokens(1), ranks=ranks).value == pytest.approx(math.exp(1.5))


def test_non_finite_predictions_raise_an_error():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(RoseExpError, match="wiki: expected finite predictions, got a mean negative log-likelihood of "):
        perplexity(model, tokens(), name="wiki")
