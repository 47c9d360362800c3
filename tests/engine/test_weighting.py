"""Weights of denoising steps."""

from __future__ import annotations

import math

import pytest

from rose_exp.engine.weighting import StepWeighting


def weights(steps: int, weighting: str, **bounds: float) -> list[float]:
    return StepWeighting(weighting=weighting, **bounds).weights(steps)


def test_log_decrease_matches_equation_4_of_the_paper():
    found = StepWeighting(weighting="log_decrease", alpha_min=0.8, alpha_max=1.2).weights(25)
    expected = [0.8 + 0.4 / math.log(25) * math.log(25 - t + 1) for t in range(1, 26)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert (found[0], found[-1]) == pytest.approx((1.2, 0.8))


def test_increasing_weights_are_reversed_decreasing_weights():
    for kind in ("log", "linear"):
        assert weights(7, f"{kind}_increase") == weights(7, f"{kind}_decrease")[::-1]
    assert weights(3, "linear_decrease", alpha_min=1, alpha_max=2) == pytest.approx([2, 1.5, 1])
    assert weights(4, "uniform") == [1.0] * 4


def test_single_step_does_not_divide_by_zero():
    assert weights(1, "log_decrease") == [1.2]
    assert weights(1, "log_increase") == [0.8]
    assert weights(1, "linear_decrease") == [1.2]


@pytest.mark.parametrize(
    ("steps", "options", "setting"),
    [
        (0, {}, "steps"),
        (3, {"weighting": "sqrt"}, "weighting"),
        (3, {"alpha_min": 2, "alpha_max": 1}, "alpha_min"),
        (3, {"alpha_min": 0, "alpha_max": 1}, "alpha_min"),
    ],
)
def test_invalid_options_raise_an_error_that_names_them(steps, options, setting):
    with pytest.raises(ValueError, match=f"{setting}: expected"):
        StepWeighting(**options).weights(steps)
