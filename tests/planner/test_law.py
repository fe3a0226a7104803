"""The law of a step against the same step laid out change by change."""

from __future__ import annotations

from itertools import accumulate

import pytest

from framework.planner.fitting import part_of
from framework.planner.law import PARTS, PASSES, PLACES, STEP, Part, StepLaw
from framework.planner.polynomials import Polynomial

FORWARD = ["10 tokens", "-3 tokens"]
BACKWARD = ["9 tokens", "12 hidden", "-16 tokens"]
CHANGES = {
    "inputs": ["8 tokens", "2 tokens"],
    **{f"forward {place}": FORWARD for place in PLACES},
    "forward first": ["4 tokens", "6 tokens", "-4 tokens"],
    "loss": ["40 labels", "40 labels", "-80 labels", "4 tokens"],
    **{f"backward {place}": BACKWARD for place in reversed(PLACES)},
    "backward first": ["9 tokens", "12 hidden", "-15 tokens"],
}
LATER = CHANGES | {name: [*CHANGES[name], "-12 hidden"] for name in CHANGES if name.startswith("backward")}
UPDATE = ["30 hidden", "-30 hidden", "-60 hidden"]


def law() -> StepLaw:
    def part(changes: list[str]) -> Part:
        return part_of([Polynomial.parse(text) for text in changes])

    passes = {name: {key: part(CHANGES[key]) for key in PARTS} for name in PASSES[:1]}
    passes[PASSES[1]] = {key: part(LATER[key]) for key in PARTS}
    return StepLaw(Polynomial.parse("12 parameters"), passes, part(UPDATE))


def laid_out(sizes: dict[str, float], blocks: int, accumulation: int) -> list[tuple[str, float]]:
    """Every change of a step, with the part it belongs to."""
    changes = []
    for number in range(accumulation):
        texts = CHANGES if number == 0 else LATER
        for name in PARTS:
            times = blocks - 4 if name.endswith("middle") else 1
            changes += [(name, Polynomial.parse(text).value(sizes)) for text in texts[name] * times]
    return changes + [(STEP, Polynomial.parse(text).value(sizes)) for text in UPDATE]


@pytest.mark.parametrize("sizes", [{"tokens": 10, "labels": 1, "hidden": 3}, {"tokens": 2, "labels": 9, "hidden": 50}])
@pytest.mark.parametrize(("blocks", "accumulation"), [(4, 1), (5, 2), (9, 1), (9, 2)])
def test_peaks_of_parts_are_those_of_the_step_laid_out(sizes, blocks, accumulation):
    changes = laid_out(sizes, blocks, accumulation)
    levels = [*accumulate(size for _, size in changes)]
    expected = {}
    for (name, _), level in zip(changes, levels, strict=True):
        expected[name] = max(level, expected.get(name, 0.0))
    found = {}
    for moment in law().moments(sizes, blocks=blocks, accumulation=accumulation):
        found[moment.part] = max(moment.peak, found.get(moment.part, 0.0))
        assert moment.peak >= moment.start
    assert found == pytest.approx(expected)


def test_more_micro_batches_than_two_change_no_peak():
    sizes = {"tokens": 5, "labels": 2, "hidden": 4}
    two, eight = ([*law().moments(sizes, blocks=5, accumulation=count)] for count in (2, 8))
    assert two == eight


def test_peaks_that_are_never_the_highest_are_left_out():
    part = part_of([Polynomial.parse(text) for text in ("4 tokens", "2 labels", "-3 tokens", "1 labels", "9")])
    assert set(part.peaks) == {Polynomial.parse(text) for text in ("4 tokens + 2 labels", "1 tokens + 3 labels + 9")}
    assert part.net == Polynomial.parse("1 tokens + 3 labels + 9")


def test_it_survives_json():
    assert StepLaw.of_json(law().to_json()) == law()
