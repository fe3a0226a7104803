"""The course of a step: a law's parts block by block, and what an engine holds at each. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from framework.planner.held import Weight, Weights
from framework.planner.law import ENDS, MIDDLES, PASSES, PHASE_OF_PART, STEP, StepLaw, instances
from framework.planner.marks import END_OF_PASS, FETCH, GRADIENT, Mark
from framework.planner.polynomials import Sizes

Place = tuple[str, int | None]
"""Name of a module or parameter, within its block if it is in one, and the index of that; None outside of blocks."""


class Holder(Protocol):
    """A model of what an engine holds of weights, gradients and the optimiser's state on one rank.

    The methods but the first two give bytes in the order in which they are allocated, or freed if negative.

    Attributes:
        alike: a micro-batch finds no gradients of the one before with the parameters.
    """

    alike: bool

    def held(self) -> dict[str, int]:
        """Bytes between steps, by what they are."""
        ...

    def on_host(self) -> int:
        """Bytes in the host's memory at most, temporaries of the update apart."""
        ...

    def begin(self) -> Iterator[int]:
        """A micro-batch begins."""
        ...

    def fetch(self, module: Place) -> Iterator[int]:
        """A module is entered, forward or backward."""
        ...

    def release(self, module: Place) -> Iterator[int]:
        """A module is left."""
        ...

    def gradient(self, weight: Weight) -> Iterator[int]:
        """A parameter has its gradient."""
        ...

    def end_of_pass(self) -> Iterator[int]:
        """A micro-batch's backward pass has ended."""
        ...

    def step(self) -> Iterator[int]:
        """The optimiser's step."""
        ...


@dataclass(frozen=True)
class Moment:
    """The highest moment of a phase, in bytes.

    Attributes:
        kept: for the backward pass, at the start of its part.
        engine: that the engine holds above what it does between steps.
        working: what the part itself has allocated.
    """

    kept: float
    engine: float
    working: float

    @property
    def peak(self) -> float:
        """Above what is held between steps."""
        return self.kept + self.engine + self.working


@dataclass(frozen=True)
class Span:
    """A part of a step, in bytes above what is held between steps.

    Attributes:
        part: its name.
        start: at its start.
        peak: at its highest.
    """

    part: str
    start: float
    peak: float


@dataclass(frozen=True)
class EngineCourse:
    """What an engine holds above what it does between steps, in the course of a step.

    Attributes:
        passes: names of the law's passes that the micro-batches are taken from, of which at most two are told apart.
        levels: bytes at the start of each part of these and after each of its marks.
        peaks: bytes at the highest at each mark.
        step: bytes before the optimiser's step, and at its highest.
    """

    passes: tuple[str, ...]
    levels: tuple[list[int], ...]
    peaks: tuple[list[int], ...]
    step: tuple[int, int]

    @classmethod
    def of(
        cls,
        law: StepLaw,
        *,
        blocks: int,
        passes: int,
        weights: Weights | None = None,
        holder: Holder | None = None,
        update: int = 0,
    ) -> EngineCourse:
        """What it holds along a law, of which the marks alone count.

        Args:
            law: of the step.
            blocks: depth of the model.
            passes: micro-batches of the step; those after the second are like it.
            weights: of the model.
            holder: of the engine, as it is between steps; None for a law without marks, which says all itself.
            update: bytes that the optimiser needs beside the weights at its step, without a holder.
        """
        alike = holder is not None and holder.alike
        names = tuple(PASSES[0 if alike else number] for number in range(min(passes, len(PASSES))))
        levels: list[list[int]] = []
        peaks: list[list[int]] = []
        level = 0
        for name in names:
            if holder is not None:
                level += sum(holder.begin())
            for part, block in instances(blocks):
                levels.append([level])
                peaks.append([])
                for mark in law.passes[name][part].marks:
                    if holder is not None and weights is not None:
                        level, peak = _advanced(level, told(holder, weights, mark, block))
                    else:
                        peak = level
                    levels[-1].append(level)
                    peaks[-1].append(peak)
        step = level + update if holder is None else _advanced(level, holder.step())[1]
        return cls(names, tuple(levels), tuple(peaks), (level, step))


class Course:
    """A step of a model of some depth under an engine.

    Args:
        law: of the step.
        blocks: depth of the model.
        engine: what the engine holds along a law with the same marks, at the same depth.
    """

    def __init__(self, law: StepLaw, *, blocks: int, engine: EngineCourse) -> None:
        self._law, self._middles = law, blocks - 2 * ENDS
        rows: list[int] = []
        held: list[float] = []
        marked: list[float] = []
        firsts: list[int] = []
        self._parts: list[tuple[str, slice]] = []
        phases: dict[str, list[int]] = {}

        def lay(part: tuple[str, str], levels: list[int], peaks: list[int]) -> None:
            own = law.rows(part)
            self._parts.append((part[1], slice(len(rows), len(rows) + len(own))))
            phases.setdefault(PHASE_OF_PART[part[1]], []).extend(range(len(rows), len(rows) + len(own)))
            firsts.extend([len(rows)] * len(own))
            rows.extend(own)
            held.extend(levels)
            # The last stretch of a part has no mark behind it.
            marked.extend([*peaks, levels[-1]])

        parts = [(name, part) for name in engine.passes for part, _ in instances(blocks)]
        for part, levels, peaks in zip(parts, engine.levels, engine.peaks, strict=True):
            lay(part, levels, peaks)
        before, highest = engine.step
        stretches = len(law.step.stretches)
        lay((STEP, STEP), [before] * stretches, [before] * (stretches - 1))
        marked[-1] = highest
        self._rows, self._firsts = np.array(rows), np.array(firsts)
        self._engine, self._marked = np.array(held, float), np.array(marked, float)
        self._places = {phase: np.array(places) for phase, places in phases.items()}

    def highest(self, sizes: Sizes) -> dict[str, Moment]:
        """The highest moment of each phase, where the symbols have these sizes."""
        starts, within, between = self._levels(sizes)
        found = {}
        for phase, places in self._places.items():
            inner = places[within[places].argmax()]
            outer = places[between[places].argmax()]
            is_inner = within[inner] >= between[outer]
            place, levels, engine = (inner, within, self._engine) if is_inner else (outer, between, self._marked)
            kept, held = float(starts[self._firsts[place]]), float(engine[place])
            found[phase] = Moment(kept, held, float(levels[place]) - kept - held)
        return found

    def spans(self, sizes: Sizes) -> list[Span]:
        """The parts of the step in order, blocks one by one."""
        starts, within, between = self._levels(sizes)
        top = np.maximum(within, between)
        return [
            Span(part, float(starts[places.start] + self._engine[places.start]), float(top[places].max()))
            for part, places in self._parts
        ]

    def _levels(self, sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every stretch: what is kept at its start, and all at its peak and at the mark behind it."""
        nets, peaks = self._law.values({**sizes, MIDDLES: self._middles})
        net = nets[self._rows]
        ends = net.cumsum()
        starts = ends - net
        return starts, starts + peaks[self._rows] + self._engine, ends + self._marked


def told(holder: Holder, weights: Weights, mark: Mark, block: int) -> Iterator[int]:
    """Let a holder hear a mark; what it allocates.

    Args:
        holder: that hears.
        weights: of the model.
        mark: of a part.
        block: that the mark counts from.
    """
    place = (mark.name, None if mark.offset is None else block + mark.offset)
    if mark.kind == GRADIENT:
        return holder.gradient(weights.by_name[place])
    if mark.kind == END_OF_PASS:
        return holder.end_of_pass()
    return holder.fetch(place) if mark.kind == FETCH else holder.release(place)


def _advanced(level: int, changes: Iterable[int]) -> tuple[int, int]:
    """The level after changes, and its peak from before them on."""
    peak = level
    for change in changes:
        level += change
        peak = max(peak, level)
    return level, peak
