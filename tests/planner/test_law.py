"""The law of a step against the same step laid out change by change."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest

from framework.planner.course import Course, EngineCourse
from framework.planner.fitting import stretch_of
from framework.planner.held import Weight, Weights
from framework.planner.law import PARTS, PASSES, PLACES, STEP, Part, StepLaw, places_of
from framework.planner.marks import END_OF_PASS, GRADIENT, Mark
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
        return Part((stretch_of([Polynomial.parse(text) for text in changes]),))

    passes = {name: {key: part(CHANGES[key]) for key in PARTS} for name in PASSES[:1]}
    passes[PASSES[1]] = {key: part(LATER[key]) for key in PARTS}
    return StepLaw(passes, part(UPDATE))


def course_of(step: StepLaw, *, blocks: int, **engine: Any) -> Course:
    return Course(step, blocks=blocks, engine=EngineCourse.of(step, blocks=blocks, **engine))


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
    for span in course_of(law(), blocks=blocks, passes=accumulation).spans(sizes):
        found[span.part] = max(span.peak, found.get(span.part, 0.0))
        assert span.peak >= span.start
    assert found == pytest.approx(expected)


def test_more_micro_batches_than_two_change_no_peak():
    sizes = {"tokens": 5, "labels": 2, "hidden": 4}
    two, eight = (course_of(law(), blocks=5, passes=count).highest(sizes) for count in (2, 8))
    assert two == eight


class Keeper:
    """Keeps gradients, with twice their bytes for a moment, and frees them in a step that takes 1000 more."""

    alike = False

    def __init__(self) -> None:
        self.kept: dict[Weight, int] = {}

    def begin(self):
        return iter(())

    def gradient(self, weight):
        new = 0 if weight in self.kept else weight.bytes
        self.kept[weight] = weight.bytes
        return iter((new, 2 * weight.bytes, -2 * weight.bytes))

    def end_of_pass(self):
        return iter((500, -500))

    def step(self):
        return iter((1000, -1000, -sum(self.kept.values())))


def test_what_an_engine_holds_is_added_at_its_marks():
    def stretches(*texts: str):
        return tuple(stretch_of([Polynomial.parse(text) for text in each.split(";")]) for each in texts)

    # Backward: 30, then the gradient is told, then 20 more, of which 40 are freed.
    marked = Part(stretches("30", "20;-40"), (Mark(GRADIENT, "weight", 0),))
    ended = Part(stretches("30", "20;-40", "0"), (Mark(GRADIENT, "weight", 0), Mark(END_OF_PASS, "", None)))
    one = {name: Part(stretches("10")) for name in PARTS}
    one |= {f"backward {place}": marked for place in PLACES} | {"backward first": ended}
    step = StepLaw({name: one for name in PASSES}, Part(stretches("0")))
    weights = Weights(tuple(Weight("weight", block, 25, 4, 0, 5) for block in range(6)), buffers=0)
    course = course_of(step, blocks=6, passes=2, weights=weights, holder=Keeper())
    spans = course.spans({})
    assert [span.part for span in spans[:9]] == [
        "inputs",
        *(f"forward {place}" for place in places_of(6)),
        "loss",
        "backward last",
    ]
    # At the first gradient 80 are kept and 30 made; it has 100, and 200 more for a moment.
    assert (spans[8].start, spans[8].peak) == (80, 80 + 30 + 300)
    # After the first pass 600 are gradients, and the blocks have left 10 each more than they freed.
    assert spans[14].start == 600 + 80 + 6 * 10
    moments = course.highest({})
    kept = 2 * (80 + 60)
    assert moments["optimizer step"].peak == kept + 600 + 1000
    assert (moments["optimizer step"].kept, moments["optimizer step"].engine) == (kept, 1600)
    assert moments["block backward"].peak == kept - 10 + 20 + 40 - 40 + 600 + 500 - 10


def test_peaks_that_are_never_the_highest_are_left_out():
    part = stretch_of([Polynomial.parse(text) for text in ("4 tokens", "2 labels", "-3 tokens", "1 labels", "9")])
    assert set(part.peaks) == {Polynomial.parse(text) for text in ("4 tokens + 2 labels", "1 tokens + 3 labels + 9")}
    assert part.net == Polynomial.parse("1 tokens + 3 labels + 9")


def test_it_survives_json():
    assert StepLaw.of_json(law().to_json()) == law()


@pytest.mark.parametrize(("blocks", "senders"), [(4, 0), (5, 1), (9, 5)])
def test_what_goes_to_the_host_is_counted_by_blocks(blocks, senders):
    plain = law()
    assert not plain.sends and "sent" not in str(plain.to_json())
    first, middle = ((Polynomial.parse("2 tokens"), Polynomial.parse("3 hidden")), (Polynomial.parse("5 tokens"),))
    sent = {"forward first": first, "forward middle": middle}
    passes = {
        name: {key: replace(part, sent=sent.get(key, ())) for key, part in parts.items()}
        for name, parts in plain.passes.items()
    }
    sending = StepLaw.of_json(json.loads(json.dumps(StepLaw(passes, plain.step).to_json())))
    assert sending.passes == passes and sending.sends
    # Those of the first micro-batch: one after the other they take the same memory.
    assert sending.sent({"tokens": 10, "labels": 1, "hidden": 7}, blocks) == [(20, 1), (21, 1), (50, senders)]
