"""The law of a step's memory: what each part of it allocates, as polynomials. Must not import torch.

A step is taken apart at the borders of blocks: what comes before the first one, each block forward, the loss (head
included), each block backward, and the optimiser's step. Blocks between the ends are alike, so a law that was recorded
with one of them holds for any depth. What an engine allocates by itself is not in the law, but where it does so is: at
the marks between the stretches of a part.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from framework.planner.marks import FETCH, Mark
from framework.planner.polynomials import Monomial, Polynomial, Sizes

ENDS = 2
"""Blocks at each end that have parts of their own: engines that gather a block's weights ahead treat them otherwise."""

BLOCKS = 2 * ENDS + 1
"""Depth of the models that are recorded: the ends, and a block like all between them."""

PLACES = ("first", "second", "middle", "last but one", "last")
"""Of the blocks of such a model."""

MIDDLES = "middles"
"""The symbol for the number of blocks that are like the middle one."""

CHUNK = "chunk"
"""The symbol for the number of rows whose logits exist at one time: those with a loss, `labels`, or `CHUNK_ROWS`."""

CHUNK_ROWS = 1024
"""As in `framework.training.fused_loss`, which imports torch."""

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


def places_of(blocks: int) -> list[str]:
    """The place of each block of a model of this depth."""
    if blocks < BLOCKS:
        return [*PLACES[: blocks // 2], *PLACES[BLOCKS - (blocks - blocks // 2) :]]
    return [*PLACES[:ENDS], *[PLACES[ENDS]] * (blocks - 2 * ENDS), *PLACES[ENDS + 1 :]]


def instances(blocks: int) -> list[tuple[str, int]]:
    """The parts of a micro-batch in order, blocks one by one, and the indices of the blocks that marks count from."""
    places = places_of(blocks)
    forward = [(f"forward {place}", index) for index, place in enumerate(places)]
    backward = [(f"backward {place}", index) for index, place in reversed([*enumerate(places)])]
    return [("inputs", 0), *forward, ("loss", blocks - 1), *backward]


@dataclass(frozen=True)
class Stretch:
    """What is allocated between two marks.

    Attributes:
        net: bytes that it leaves behind, less those of others that it frees.
        peaks: bytes above its start that may be its highest; which of them is depends on the sizes.
    """

    net: Polynomial
    peaks: tuple[Polynomial, ...]

    def to_json(self) -> list[str]:
        """As JSON values."""
        return [str(self.net), *map(str, self.peaks)]

    @classmethod
    def of_json(cls, value: list[str]) -> Stretch:
        """The stretch that `to_json` gave."""
        net, *peaks = map(Polynomial.parse, value)
        return cls(net, tuple(peaks))


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        stretches: in order.
        marks: between them.
        sent: bytes of each tensor that retention sends to the host.
    """

    stretches: tuple[Stretch, ...]
    marks: tuple[Mark, ...] = ()
    sent: tuple[Polynomial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        sent = {"sent": [*map(str, self.sent)]} if self.sent else {}
        return {"stretches": [each.to_json() for each in self.stretches], "marks": [*map(str, self.marks)]} | sent

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Part:
        """The part that `to_json` gave."""
        stretches = map(Stretch.of_json, value["stretches"])
        sent = map(Polynomial.parse, value.get("sent", ()))
        return cls(tuple(stretches), tuple(map(Mark.parse, value["marks"])), tuple(sent))


@dataclass(frozen=True)
class StepLaw:
    """What a step allocates beside what a rank holds all the time.

    Attributes:
        passes: for each of `PASSES` its parts, by the names of `PARTS`.
        step: the optimiser's.
    """

    passes: dict[str, dict[str, Part]]
    step: Part

    def values(self, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
        """Where the symbols have these sizes, of every stretch the bytes that it leaves behind, and those at its peak.

        `rows` says which stretch is where.
        """
        return self._tables.values(sizes)

    def rows(self, part: tuple[str, str]) -> range:
        """Where the stretches of a part are; its pass and its name, or `STEP` twice."""
        return self._tables.rows[part]

    def sent(self, sizes: Sizes, blocks: int) -> list[tuple[float, int]]:
        """Bytes of every tensor that a micro-batch's retention sends to the host, and of how many blocks each is one.

        Args:
            sizes: of the symbols.
            blocks: depth of the model.
        """
        counts = Counter(f"forward {place}" for place in places_of(blocks))
        found = zip(self._tables.sent(sizes), self._tables.senders, strict=True)
        return [(float(size), counts[part]) for size, part in found]

    @cached_property
    def sends(self) -> bool:
        """Whether retention sends anything to the host."""
        return bool(self._tables.senders)

    @cached_property
    def _tables(self) -> _Tables:
        parts = {(name, part): law for name, parts in self.passes.items() for part, law in parts.items()}
        return _Tables(parts | {(STEP, STEP): self.step})

    @cached_property
    def symbols(self) -> frozenset[str]:
        """All that its polynomials are in."""
        return frozenset(symbol for monomial in self._tables.monomials for symbol in monomial)

    @cached_property
    def marks(self) -> tuple[tuple[Mark, ...], ...]:
        """Of every part of the passes, in their order: laws that differ in other things may have the same."""
        return tuple(part.marks for parts in self.passes.values() for part in parts.values())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        passes = {name: {part: law.to_json() for part, law in parts.items()} for name, parts in self.passes.items()}
        return {"passes": passes, "step": self.step.to_json()}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> StepLaw:
        """The law that `to_json` gave."""
        passes = {
            name: {part: Part.of_json(law) for part, law in parts.items()} for name, parts in value["passes"].items()
        }
        return cls(passes, Part.of_json(value["step"]))


class _Tables:
    """All polynomials of a law as matrices, so that one product evaluates them."""

    def __init__(self, parts: dict[tuple[str, str], Part]) -> None:
        nets: list[Polynomial] = []
        peaks: list[Polynomial] = []
        self._first_peaks: list[int] = []
        self.rows: dict[tuple[str, str], range] = {}
        for key, part in parts.items():
            begin = len(nets)
            for stretch in part.stretches:
                nets.append(stretch.net)
                self._first_peaks.append(len(peaks))
                # The start of a stretch is a peak, too: all that follows may be below it.
                peaks += [Polynomial(), *stretch.peaks]
            self.rows[key] = range(begin, len(nets))
        senders = [(name, size) for (pass_, name), part in parts.items() if pass_ == PASSES[0] for size in part.sent]
        self.senders, sent = [name for name, _ in senders], [size for _, size in senders]
        monomials = {monomial for polynomial in (*nets, *peaks, *sent) for monomial in polynomial.terms}
        self.monomials: list[Monomial] = sorted(monomials)
        self._nets, self._peaks, self._sent = self._matrix(nets), self._matrix(peaks), self._matrix(sent)

    def _matrix(self, polynomials: Sequence[Polynomial]) -> np.ndarray:
        columns = {monomial: column for column, monomial in enumerate(self.monomials)}
        matrix = np.zeros((len(polynomials), len(columns)))
        for row, polynomial in enumerate(polynomials):
            for monomial, coefficient in polynomial.terms.items():
                matrix[row, columns[monomial]] = coefficient.numerator / coefficient.denominator
        return matrix

    def values(self, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
        values = self._of_monomials(sizes)
        return self._nets @ values, np.maximum.reduceat(self._peaks @ values, self._first_peaks)

    def sent(self, sizes: Sizes) -> np.ndarray:
        sent: np.ndarray = self._sent @ self._of_monomials({**sizes, MIDDLES: 0})
        return sent

    def _of_monomials(self, sizes: Sizes) -> np.ndarray:
        sizes = {**sizes, CHUNK: min(sizes.get("labels", 0), CHUNK_ROWS)}
        return np.array([math.prod(sizes[symbol] for symbol in monomial) for monomial in self.monomials])


def trace_of(law: StepLaw, blocks: int) -> list[tuple[str, int | None]]:
    """The modules of a micro-batch in the order in which they are entered, forward and backward."""
    found = []
    for part, block in instances(blocks):
        for mark in law.passes[PASSES[0]][part].marks:
            if mark.kind == FETCH:
                found.append((mark.name, None if mark.offset is None else block + mark.offset))
    return found
