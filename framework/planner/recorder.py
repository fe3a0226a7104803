"""A memory tracker that writes down, in order, what a step allocates: part by part, what an engine does apart."""

from __future__ import annotations

import weakref
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from framework.planner.law import ENDS, PLACES, STEP
from framework.planner.marks import Mark
from framework.training.memory import CpuMemoryTracker

_MIDDLE = {f"{way} {PLACES[ENDS]}" for way in ("forward", "backward")}
_NO_BLOCK = {"inputs", "loss", STEP}


class Change(NamedTuple):
    """An allocation, or what is freed.

    Attributes:
        bytes: negative for what is freed.
        repeated: a part that is no block's frees what the middle block has made: so it does with every block like it.
        factor: a symbol that the bytes are to be multiplied by; see `framework.planner.options`.
        of_chunk: it was made for a chunk of the rows that have a loss, as all of them are in a recording.
    """

    bytes: int
    repeated: bool
    factor: str | None = None
    of_chunk: bool = False


class Sent(NamedTuple):
    """A tensor that retention has sent to the host: its bytes, and a symbol that they are to be multiplied by."""

    bytes: int
    factor: str | None


class _OnHost(NamedTuple):
    """A storage there."""

    storage: weakref.ref[torch.UntypedStorage]
    bytes: int
    factor: str | None


@dataclass
class RecordedPart:
    """A part of a step.

    Attributes:
        name: of `PARTS`, or the optimiser's step.
        changes: bytes of each allocation, in order; negative for what is freed.
        stretches: those that are not the engine's, between marks.
        marks: between the stretches.
        engine: of each mark, what the engine allocated and freed from it up to the next one.
        sent: what went to the host, in order.
    """

    name: str
    changes: list[int] = field(default_factory=list)
    stretches: list[list[Change]] = field(default_factory=lambda: [[]])
    marks: list[Mark] = field(default_factory=list)
    engine: list[list[int]] = field(default_factory=lambda: [[]])
    sent: list[Sent] = field(default_factory=list)


# torch's dispatch modes are not annotated.
class Recorder(CpuMemoryTracker):  # type: ignore[no-untyped-call]  # torch's mode
    """A tracker that writes down what it sees, what an engine does by itself apart.

    Attributes:
        host_peak: the most bytes that were on the host, of what the recorder has been told is there.
    """

    def __init__(self) -> None:
        """Nothing is seen yet, and nothing is on the host."""
        super().__init__()
        self.host_peak = 0
        self._host: dict[int, _OnHost] = {}
        self.parts: list[RecordedPart] = []
        self._at_work = 0
        self._after_blocks = False
        self._in_chunk = False
        self._engines: set[int] = set()
        self._births: dict[int, int] = {}
        # Keys of what the middle block has made.
        self._of_middle: set[int] = set()
        # Of what was made for a chunk.
        self._of_chunk: set[int] = set()
        self._counter = count()
        # Where the allocation of what is live was written, and the factors of what has one.
        self._written: dict[int, tuple[list[Change], int]] = {}
        self._factors: dict[int, str] = {}
        # Births of what was freed since the last allocation: libraries free what is in tables in no order of theirs.
        self._freed: list[int] = []

    def begin(self, name: str) -> None:
        """From here on it is another part."""
        self.parts.append(RecordedPart(name))
        self._freed.clear()

    def mark(self, mark: Mark, given: Tensor | None = None) -> None:
        """From here on it is another stretch.

        Args:
            mark: between the two.
            given: a tensor that is the engine's from here on.
        """
        if not self.parts:
            return
        self._freed.clear()
        part = self.parts[-1]
        part.marks.append(mark)
        part.engine.append([])
        key = None if given is None else given.untyped_storage()._cdata
        if key is not None and key in self._live and key not in self._engines:
            self._engines.add(key)
            size = self._live[key][1]
            part.stretches[-1].append(Change(-size, False))
            part.engine[-1].append(size)
        part.stretches.append([])

    def scale(self, tensor: Tensor, factor: str) -> None:
        """What a tensor takes is to be multiplied by a symbol, from its allocation until it is freed."""
        key = tensor.untyped_storage()._cdata
        if key in self._written:
            stretch, place = self._written[key]
            stretch[place] = stretch[place]._replace(factor=factor)
            self._factors[key] = factor

    def complete(self, tensor: Tensor, factor: str) -> None:
        """From here on a scaled tensor is there whatever the sizes: what was not of it, a symbol says, is made now."""
        key = tensor.untyped_storage()._cdata
        if self._factors.pop(key, None) is not None:
            self.assume(self._live[key][1], factor)

    def assume(self, size: int, factor: str) -> None:
        """So many bytes, a symbol says, are allocated now, or freed if negative; they are not in this recording."""
        if self.parts:
            self._freed.clear()
            self.parts[-1].stretches[-1].append(Change(size, False, factor))

    def on_host(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that exist already are on the host."""
        for tensor in tensors:
            self._add_to_host(tensor.untyped_storage())

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether it is, as far as the recorder has been told or has seen."""
        return tensor.untyped_storage()._cdata in self._host

    def _add_to_host(self, storage: torch.UntypedStorage, factor: str | None = None) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, lambda _: self._host.pop(key, None))
        self._host[key] = _OnHost(reference, storage.nbytes(), factor)
        self.host_peak = max(self.host_peak, sum(each.bytes for each in self._host.values()))

    def _sent(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        for tensor, copy in zip(tensors, copies, strict=True):
            factor = self._factors.get(tensor.untyped_storage()._cdata)
            self._add_to_host(copy.untyped_storage(), factor)
            if self.parts:
                self.parts[-1].sent.append(Sent(copy.untyped_storage().nbytes(), factor))

    def _fetched(self, copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        for copy, tensor in zip(copies, tensors, strict=True):
            factor = self._host[copy.untyped_storage()._cdata].factor
            if factor is not None:
                self.scale(tensor, factor)

    def own(self) -> None:
        """What is live now is the engine's, with all that becomes of it."""
        self._engines.update(self._live)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What is made within this context is the engine's."""
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    @contextmanager
    def after_blocks(self) -> Iterator[None]:
        """What is freed within this context is freed for all blocks, though it is still a block's part."""
        self._after_blocks = True
        try:
            yield
        finally:
            self._after_blocks = False

    @contextmanager
    def in_chunk(self) -> Iterator[None]:
        """What is made within this context is made for a chunk."""
        self._in_chunk = True
        try:
            yield
        finally:
            self._in_chunk = False

    def _count(self, storage: torch.UntypedStorage) -> None:
        if self._at_work and storage._cdata not in self._live:
            self._engines.add(storage._cdata)
        super()._count(storage)

    def _take_over(self, old: int) -> bool:
        storage = self._sum[0]() if self._sum is not None else None
        if storage is None or not super()._take_over(old):
            return False
        self._births[storage._cdata] = self._births.pop(old)
        for keys in (self._engines, self._of_middle, self._of_chunk):
            if old in keys:
                keys.discard(old)
                keys.add(storage._cdata)
        return True

    def _change(self, size: int, key: int) -> None:
        super()._change(size, key)
        engines, part = key in self._engines, self.parts[-1] if self.parts else None
        if key not in self._births:
            self._births[key] = next(self._counter)
            if part is not None and part.name in _MIDDLE:
                self._of_middle.add(key)
            if self._in_chunk:
                self._of_chunk.add(key)
        birth = self._births[key]
        repeated = False
        if size < 0 and key in self._of_middle and part is not None:
            repeated = part.name in _NO_BLOCK or self._after_blocks
        factor = self._factors.get(key)
        of_chunk = key in self._of_chunk
        if key not in self._live:
            self._written.pop(key, None)
            self._factors.pop(key, None)
            self._engines.discard(key)
            self._of_middle.discard(key)
            self._of_chunk.discard(key)
            del self._births[key]
        if part is not None and size:
            part.changes.append(size)
            if engines:
                part.engine[-1].append(size)
            else:
                stretch = part.stretches[-1]
                if size > 0:
                    self._written[key] = stretch, len(stretch)
                self._write(stretch, Change(size, repeated, factor, of_chunk), birth)

    def _write(self, stretch: list[Change], change: Change, birth: int) -> None:
        """Append a change to a stretch; what is freed at once is in the order in which it was made."""
        place = len(stretch)
        if change.bytes > 0:
            self._freed.clear()
        else:
            earlier = bisect(self._freed, birth)
            place -= len(self._freed) - earlier
            self._freed.insert(earlier, birth)
        stretch.insert(place, change)
