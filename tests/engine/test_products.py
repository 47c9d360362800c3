"""Symmetric and triangular products against full matrix products."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import InputMoments
from rose_exp.engine.products import add_gram, mirror, quadratic_form, times_lower, times_upper, upper_times

SIZES = [1, 7, 192, 193, 500, 1000]


@pytest.mark.parametrize("n", SIZES)
def test_gram_matrix_from_its_upper_triangle(n):
    first, second = torch.randn(3, n, dtype=torch.float64), torch.randn(5, n, dtype=torch.float64)
    gram = torch.zeros(n, n, dtype=torch.float64)
    add_gram(gram, first)
    mirror(gram)
    add_gram(gram, second, weight=0.5)  # after mirroring, entries below the diagonal must not be counted twice
    mirror(gram)
    torch.testing.assert_close(gram, first.T @ first + 0.5 * second.T @ second)


def test_reading_moments_does_not_change_them():
    inputs = torch.randn(4, 9, 300, dtype=torch.float64)
    read, unread = (InputMoments(300, dtype=torch.float64) for _ in range(2))
    for sample in inputs:
        read.update(sample)
        torch.testing.assert_close(read.gram, read.gram.T)
        unread.update(sample)
    torch.testing.assert_close(read.gram, unread.gram)
    other = InputMoments(300, dtype=torch.float64)
    other.update(inputs[0])
    unread.merge(other)
    torch.testing.assert_close(unread.gram, read.gram + other.gram)


def test_precisions_have_the_expected_accuracy():
    inputs = torch.randn(2000, 256) + 0.5
    exact = inputs.double().T @ inputs.double()
    deviation = {}
    for precision in ("float32", "bf16x2"):
        moments = InputMoments(256, precision=precision)
        moments.update(inputs)
        deviation[precision] = float((moments.gram.double() - exact).norm() / exact.norm())
    assert deviation["float32"] < 1e-6
    assert deviation["float32"] < deviation["bf16x2"] < 2e-5
    one_bfloat16 = inputs.bfloat16().double()
    assert float((one_bfloat16.T @ one_bfloat16 - exact).norm() / exact.norm()) > 4 * deviation["bf16x2"]
    with pytest.raises(ValueError, match="precision: expected one of float32, tf32, bf16x2, got 'half'"):
        InputMoments(4, precision="half")


def test_tf32_flag_is_restored(monkeypatch):
    seen = []

    def blocks(*_):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return []

    monkeypatch.setattr("rose_exp.engine.products.upper_blocks", blocks)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        add_gram(torch.zeros(4, 4), torch.ones(2, 4))
        assert torch.backends.cuda.matmul.allow_tf32  # restored
        torch.backends.cuda.matmul.allow_tf32 = False
        add_gram(torch.zeros(4, 4), torch.ones(2, 4), precision="tf32")
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert seen == [False, True]


@pytest.mark.parametrize("n", SIZES)
def test_triangular_products_and_quadratic_forms(n):
    upper = torch.randn(n, n, dtype=torch.float64).triu()
    wide, tall = torch.randn(6, n, dtype=torch.float64), torch.randn(n, 6, dtype=torch.float64)
    for product, a, expected in (
        (lambda a: times_upper(a, upper), wide, wide @ upper),
        (lambda a: times_lower(a, upper), wide, wide @ upper.T),
        (lambda a: upper_times(upper, a), tall, upper @ tall),
    ):
        changed = a.clone()
        product(changed)
        torch.testing.assert_close(changed, expected)
    symmetric = upper + upper.T
    torch.testing.assert_close(quadratic_form(wide, symmetric), ((wide @ symmetric) * wide).sum())
