"""How much each denoising step counts."""

from __future__ import annotations

import math

import pytest

from rose_exp.engine.weighting import step_weights


def test_log_decrease_is_the_papers_equation_4():
    found = step_weights(25, "log_decrease", 0.8, 1.2)
    expected = [0.8 + 0.4 / math.log(25) * math.log(25 - t + 1) for t in range(1, 26)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert (found[0], found[-1]) == pytest.approx((1.2, 0.8))


def test_increasing_is_decreasing_from_the_other_end():
    for kind in ("log", "linear"):
        assert step_weights(7, f"{kind}_increase") == step_weights(7, f"{kind}_decrease")[::-1]
    assert step_weights(3, "linear_decrease", 1, 2) == pytest.approx([2, 1.5, 1])
    assert step_weights(4, "uniform") == [1.0] * 4


def test_one_step_is_no_division_by_zero():
    assert step_weights(1, "log_decrease") == [1.2]
    assert step_weights(1, "log_increase") == [0.8]
    assert step_weights(1, "linear_decrease") == [1.2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((0,), "steps"), ((3, "sqrt"), "weighting"), ((3, "uniform", 2, 1), "alpha_min"), ((3, "uniform", 0, 1), "alpha_min")],
)
def test_what_makes_no_sense_is_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        step_weights(*arguments)
