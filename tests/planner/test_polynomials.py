"""Polynomials against their values."""

from __future__ import annotations

from fractions import Fraction

import pytest

from framework.planner.polynomials import Polynomial

SIZES = {"batch": 3.0, "hidden": 5.0, "tokens": 7.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0.0),
        ("8", 8.0),
        ("4 batch hidden tokens", 420.0),
        ("-2 hidden + 1/2 tokens tokens", 14.5),
        ("8 batch - 3 hidden", 9.0),
    ],
)
def test_text_and_value(text, value):
    polynomial = Polynomial.parse(text)
    assert polynomial.value(SIZES) == value
    assert Polynomial.parse(str(polynomial)) == polynomial


def test_arithmetic_is_that_of_values():
    a, b = Polynomial.parse("4 batch hidden + 1/2"), Polynomial.parse("3 hidden - 4 batch hidden")
    assert (a + b).terms == {("hidden",): 3, (): Fraction(1, 2)}
    assert (a - b).value(SIZES) == a.value(SIZES) - b.value(SIZES)
    assert (a * Fraction(3, 2)).value(SIZES) == 1.5 * a.value(SIZES)
    assert Polynomial({("tokens", "batch"): 2}) == Polynomial({("batch", "tokens"): 2, ("hidden",): 0})
