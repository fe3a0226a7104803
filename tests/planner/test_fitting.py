"""Polynomials found again from their values."""

from __future__ import annotations

import pytest

from framework.planner.fitting import TINY, Fitter, UnknownSizeError
from framework.planner.polynomials import Polynomial

SAMPLES = [
    {"batch": b, "tokens": s, "hidden": h, "mlp": m, "vocab": v, "share": share, "parameters": p, "trained_tensors": n}
    for b, s, h, m, v, share, p, n in [
        (2, 40, 120, 68, 212, 0.5, 306600, 30),
        (3, 56, 208, 92, 284, 0.25, 621296, 21),
        (2, 72, 280, 116, 332, 0.5, 979160, 30),
        (4, 48, 264, 148, 236, 0.25, 813720, 48),
        (3, 64, 288, 76, 260, 0.5, 597888, 12),
        (2, 88, 144, 124, 316, 0.25, 512208, 39),
    ]
]


def values(text: str) -> list[float]:
    return [Polynomial.parse(text).value(sample) for sample in SAMPLES]


@pytest.mark.parametrize(
    "text",
    [
        "8",
        "4 batch hidden tokens",
        "1 batch tokens tokens",
        "4 hidden mlp share",
        "8 batch tokens + 8",
        "-1 batch + 1 batch tokens",
        "2 hidden vocab + 4 batch mlp tokens",
        "-4 hidden vocab",
    ],
)
def test_the_simplest_polynomial_with_the_values_is_found(text):
    assert Fitter(SAMPLES)(values(text)) == Polynomial.parse(text)


def test_no_polynomial_of_two_terms():
    counts = [round(value) for value in values("4 batch hidden tokens + 8 hidden mlp + 3 vocab tokens")]
    with pytest.raises(UnknownSizeError, match=rf"no polynomial gives \[{counts[0]}, "):
        Fitter(SAMPLES)(counts)
    irregular = [7, 19, 23, 41, 5, TINY + 1]
    with pytest.raises(UnknownSizeError):
        Fitter(SAMPLES)(irregular)


def test_what_is_tiny_need_not_be_a_polynomial():
    assert Fitter(SAMPLES)([7, 19, 23, 41, 5, TINY]) == Polynomial.parse(f"{TINY}")
    assert Fitter(SAMPLES)([-7, -19, -23, -41, -5, -3]) == Polynomial.parse(f"-{TINY}")


PACKED = [
    sample | {"packed": packed, "block": block, "block_packed": within}
    for sample, packed, block, within in zip(
        SAMPLES,
        (260195, 579670, 1369495, 1171435, 552860, 1173930),
        (6960, 20704, 46832, 71888, 44736, 100608),
        (52039, 115934, 273899, 234287, 110572, 234786),
        strict=True,
    )
]


@pytest.mark.parametrize(
    ("text", "padding"),
    [
        ("1/2 hidden mlp share", (0, 24, 0, 16, 8, 24)),
        ("1/128 hidden mlp", (1, 0, 1, 2, 1, 0)),
        ("2 block + 1 block_packed", (173, 338, 185, 601, 8, 434)),
        ("-2 block - 1 block_packed", (-173, -338, -185, -601, -8, -434)),
    ],
)
def test_what_is_shared_out_in_groups_is_nearly_a_polynomial(text, padding):
    counts = [round(Polynomial.parse(text).value(sample)) + more for sample, more in zip(PACKED, padding, strict=True)]
    assert Fitter(PACKED)(counts) == Polynomial.parse(text)
    without = [sample | {"packed": 0, "block_packed": 0} for sample in PACKED]
    with pytest.raises(UnknownSizeError):
        Fitter(without)(counts)


def test_what_is_far_from_a_polynomial_is_none_with_packed_weights_either():
    with pytest.raises(UnknownSizeError):
        Fitter(PACKED)([70001, 19001, 923, 41777, 512345, 1001])
