"""Streaming moments do not depend on token order, batching or input precision, except for rounding."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import InputMoments


def test_statistics_equal_those_of_all_tokens():
    inputs = torch.randn(50, 7, dtype=torch.float64) + 1
    moments = InputMoments(7, dtype=torch.float64)
    moments.update(inputs)
    torch.testing.assert_close(moments.hessian(), 2 * inputs.T @ inputs / 50)
    torch.testing.assert_close(moments.mean(), inputs.mean(dim=0))
    torch.testing.assert_close(moments.mean_square(), inputs.square().mean(dim=0))
    torch.testing.assert_close(moments.variance(), inputs.var(dim=0, unbiased=False))
    assert moments.tokens == 50


def test_moments_do_not_depend_on_split_or_order():
    inputs = torch.randn(6, 8, 5, dtype=torch.float64)
    whole, parts, merged = (InputMoments(5, dtype=torch.float64) for _ in range(3))
    whole.update(inputs)
    for sample in inputs.flip(0):
        parts.update(sample[None])
    other = InputMoments(5, dtype=torch.float64)
    merged.update(inputs[:2])
    other.update(inputs[2:])
    merged.merge(other)
    for moments in (parts, merged):
        assert moments.tokens == whole.tokens == 48
        torch.testing.assert_close(moments.gram, whole.gram)
        torch.testing.assert_close(moments.sum, whole.sum)


def test_weighting_tokens_equals_repeating_them():
    inputs = torch.randn(2, 10, 5, dtype=torch.float64)
    weighted, repeated = InputMoments(5, dtype=torch.float64), InputMoments(5, dtype=torch.float64)
    weighted.update(inputs[0], weight=3)
    weighted.update(inputs[1])
    for sample in (0, 0, 0, 1):
        repeated.update(inputs[sample])
    torch.testing.assert_close(weighted.hessian(), repeated.hessian())
    torch.testing.assert_close(weighted.variance(), repeated.variance())


def test_half_precision_inputs_are_multiplied_in_float32():
    inputs = (torch.randn(64, 4) * 300).half()  # squares overflow float16
    moments = InputMoments(4)
    moments.update(inputs)
    torch.testing.assert_close(moments.hessian(), 2 * inputs.float().T @ inputs.float() / 64)


def test_moments_without_tokens_are_zero():
    moments = InputMoments(3)
    assert not moments.hessian().any()
    assert not moments.variance().any()


def test_invalid_inputs_raise_an_error():
    moments = InputMoments(4)
    with pytest.raises(ValueError, match=r"inputs: expected shape \(\.\.\., 4\), got \(2, 3\)"):
        moments.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"inputs: expected a floating type, got torch.int64"):
        moments.update(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight: expected a number of at least 0, got -1"):
        moments.update(torch.ones(2, 4), weight=-1)
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"):
        InputMoments(0)
    with pytest.raises(ValueError, match=r"dtype: expected torch.float32 or torch.float64"):
        InputMoments(4, dtype=torch.float16)
