"""The script that measures scaling."""

from __future__ import annotations

import pytest

from scripts.measure_scaling import exponents


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_exponents_are_slopes_on_logarithms(power):
    sizes = [2.0, 4.0, 16.0]
    first, *slopes = exponents(sizes, [5 * size**power for size in sizes])
    assert first is None
    assert slopes == pytest.approx([power, power])
