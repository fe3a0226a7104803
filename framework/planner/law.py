"""The law of a step's memory: what each part of it allocates, as polynomials. Must not import torch.

A step is taken apart at the borders of blocks: what comes before the first one, each block forward, the loss (head
included), each block backward, and the optimiser's step. Blocks between the ends are alike, so a law that was recorded
with one of them holds for any depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from framework.planner.polynomials import Monomial, Polynomial, Sizes

ENDS = 2
"""Blocks at each end that have parts of their own: engines that gather a block's weights ahead treat them otherwise."""

BLOCKS = 2 * ENDS + 1
"""Depth of the models that are recorded: the ends, and a block like all between them."""

PLACES = ("first", "second", "middle", "last but one", "last")
"""Of the blocks of such a model."""

PASSES = ("first", "later")
"""Micro-batches of a step: those after the first find gradients that they add to."""

PARTS = (
    "inputs",
    *(f"forward {place}" for place in PLACES),
    "loss",
    *(f"backward {place}" for place in reversed(PLACES)),
)
"""Of a micro-batch, in order."""

STEP = "optimizer step"

PHASE_OF_PART = {
    part: {"inputs": "forward", "loss": "loss", STEP: STEP}.get(
        part, "forward" if part.startswith("forward") else "block backward"
    )
    for part in (*PARTS, STEP)
}


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        net: bytes that it leaves behind, less those of others that it frees.
        peaks: bytes above its start that may be its highest; which of them is depends on the sizes.
    """

    net: Polynomial
    peaks: tuple[Polynomial, ...]

    def peak(self, sizes: Sizes) -> float:
        """Bytes above its start at its highest."""
        return max((peak.value(sizes) for peak in self.peaks), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"net": str(self.net), "peaks": [*map(str, self.peaks)]}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Part:
        """The part that `to_json` gave."""
        return cls(Polynomial.parse(value["net"]), tuple(map(Polynomial.parse, value["peaks"])))


@dataclass(frozen=True)
class Moment:
    """A part of a step at given sizes.

    Attributes:
        part: its name.
        start: bytes above the start of the step, at its start.
        peak: the same, at its highest.
    """

    part: str
    start: float
    peak: float


@dataclass(frozen=True)
class StepLaw:
    """What a rank holds, and what a step allocates beside it.

    Attributes:
        start: weights, buffers and the optimiser's state, which are there before and after.
        passes: for each of `PASSES` its parts, by the names of `PARTS`.
        step: the optimiser's.
    """

    start: Polynomial
    passes: dict[str, dict[str, Part]]
    step: Part

    def moments(self, sizes: Sizes, *, blocks: int, accumulation: int) -> Iterator[Moment]:
        """The parts of a step in order; of equal ones in a row, such as blocks, the first and the last.

        Args:
            sizes: of the symbols.
            blocks: depth of the model; below `BLOCKS` the ends are taken to overlap.
            accumulation: micro-batches of a step.
        """
        start, values = 0.0, self._values(sizes)
        for _ in range(min(accumulation, 2)):
            for name in PARTS:
                repeated = blocks - 2 * ENDS if name.endswith("middle") else 1
                net, peak = next(values)
                for index in sorted({0, repeated - 1} if repeated > 0 else ()):
                    yield Moment(name, start + index * net, start + index * net + peak)
                start += repeated * net
        # The last one of all, whether or not there was a later micro-batch.
        yield Moment(STEP, start, start + [*values][-1][1])

    def _values(self, sizes: Sizes) -> Iterator[tuple[float, float]]:
        """Net and peak of all parts in order; their polynomials at once, for a search asks for many sizes."""
        monomials, coefficients, firsts = self._compiled
        values = coefficients @ np.array([prod(map(sizes.__getitem__, monomial)) for monomial in monomials])
        nets, peaks = values[: len(firsts)], np.maximum.reduceat(values[len(firsts) :], firsts)
        return zip(nets.tolist(), peaks.tolist(), strict=True)

    @cached_property
    def _compiled(self) -> tuple[list[Monomial], np.ndarray, list[int]]:
        """All monomials; coefficients of the nets of all parts, and then of all their peaks; the parts' first peaks."""
        parts = [*(self.passes[number][name] for number in PASSES for name in PARTS), self.step]
        peaks = [part.peaks or (Polynomial(),) for part in parts]
        rows = [*(part.net for part in parts), *(peak for each in peaks for peak in each)]
        monomials = sorted({monomial for row in rows for monomial in row.terms})
        places = {monomial: place for place, monomial in enumerate(monomials)}
        coefficients = np.zeros((len(rows), len(monomials)))
        for number, row in enumerate(rows):
            for monomial, coefficient in row.terms.items():
                coefficients[number, places[monomial]] = float(coefficient)
        return monomials, coefficients, [*accumulate(map(len, peaks[:-1]), initial=0)]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        passes = {name: {part: law.to_json() for part, law in parts.items()} for name, parts in self.passes.items()}
        return {"start": str(self.start), "passes": passes, "step": self.step.to_json()}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> StepLaw:
        """The law that `to_json` gave."""
        passes = {
            name: {part: Part.of_json(law) for part, law in parts.items()} for name, parts in value["passes"].items()
        }
        return cls(Polynomial.parse(value["start"]), passes, Part.of_json(value["step"]))
