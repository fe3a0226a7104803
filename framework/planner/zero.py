"""What ZeRO allocates beside the passes in stages 0 to 2: gradients, buckets, partitions. Must not import torch.

The model follows DeepSpeed 0.19's `stage_1_and_2.py` and this project's `zero_stages.py` change by change. Sizes depend
on how parameters fill buckets, which is no polynomial in the sizes of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from math import ceil

from framework.planner.course import Place
from framework.planner.held import Weight, Weights

WEIGHTS, MASTERS, STATE, GRADIENTS = "weights", "master weights", "optimizer state", "gradients"

GRADIENT_BUFFER = "buffer for a gradient's way to the host"

State = Callable[[int, int], int]
"""Elements of a tensor and bytes of each of them -> bytes of what the optimiser keeps for it."""

Update = Callable[[int], int]
"""Elements of a tensor -> bytes that the optimiser needs beside it while it updates it."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of one element.

    Attributes:
        weight: as it is used in passes; a gradient has as many.
        summed: of a gradient summed up over micro-batches.
        master: of what the optimiser updates.
    """

    weight: int
    summed: int
    master: int


@dataclass(frozen=True)
class Buckets:
    """Sizes of DeepSpeed's buffers in elements, and whether exchanges overlap the passes; see `bucket_sizes`."""

    reduce: int
    overlap: bool = False
    prefetch: int = 0
    persistence: int = 0
    max_live: int = 0
    max_reuse: int = 0
    sub_group: int = 0
    one_by_one: bool = False


@dataclass(frozen=True)
class Offload:
    """What is on the host: the master weights and the optimiser's state with the sums of gradients, and the weights."""

    optimizer: bool = False
    weights: bool = False


NOTHING = Offload()


def flattened(elements: int, size: Bytes) -> Generator[int, None, int]:
    """The sums of a partition in one tensor, in the dtype of what is updated; returns its bytes."""
    yield (flat := elements * size.summed)
    if size.master != size.summed:
        yield (master := elements * size.master)
        yield -flat
        flat = master
    return flat


class _WholeWeights:
    """Weights are whole all the time, so that modules come and go unnoticed."""

    def begin(self) -> Iterator[int]:
        """See `Holder.begin`."""
        yield from ()

    def fetch(self, module: Place) -> Iterator[int]:
        """See `Holder.fetch`."""
        yield from ()

    def release(self, module: Place) -> Iterator[int]:
        """See `Holder.release`."""
        yield from ()


class WholeGradients(_WholeWeights):
    """Gradients stay with their parameters until the step: one process, or stage 0 in several.

    Args:
        weights: of the model.
        state: of the optimiser.
        update: of the optimiser.
        bucket: elements that are reduced at a time, or more with the last of them; None for one process.
    """

    alike = False

    def __init__(self, weights: Weights, state: State, update: Update, bucket: int | None = None) -> None:
        self._weights, self._state, self._update, self._bucket = weights, state, update, bucket
        self._whole: dict[Weight, int] = {}

    def held(self) -> dict[str, int]:
        """See `Holder.held`."""
        weights = sum(weight.bytes for weight in self._weights.all) + self._weights.buffers
        state = sum(self._state(weight.elements, weight.itemsize) for weight in self._weights.all if weight.trained)
        return {WEIGHTS: weights, STATE: state}

    def on_host(self) -> int:
        """See `Holder.on_host`."""
        return 0

    def gradient(self, weight: Weight) -> Iterator[int]:
        """See `Holder.gradient`."""
        if weight not in self._whole:
            self._whole[weight] = weight.bytes
            yield weight.bytes

    def end_of_pass(self) -> Iterator[int]:
        """See `Holder.end_of_pass`."""
        yield from ()

    def step(self) -> Iterator[int]:
        """See `Holder.step`: the gradients are reduced, and the weights updated."""
        if self._bucket is not None:
            yield from self._reduced(self._bucket)
        for weight in self._whole:
            yield (needed := self._update(weight.elements))
            yield -needed
        yield -sum(self._whole.values())
        self._whole.clear()

    def _reduced(self, bucket: int) -> Iterator[int]:
        """Copies of so many gradients at a time that they are more than a bucket."""
        filled = copied = 0
        for weight in self._weights.all:
            if weight in self._whole:
                filled, copied = filled + weight.elements, copied + weight.bytes
                if filled > bucket:
                    yield copied
                    yield -copied
                    filled = copied = 0
        yield copied
        yield -copied


class FlatPartitions(_WholeWeights):
    """Stages 1 and 2: a rank sums up its partition of the gradients, and updates its partition of the weights.

    Args:
        weights: of the model.
        size: bytes of an element.
        state: of the optimiser.
        update: of the optimiser.
        buckets: of the run.
        stage: 1 or 2.
        ranks: that the model is partitioned over.
        rank: one of them; None for one with most gradients.
        offload: what is on the host.
    """

    def __init__(
        self,
        weights: Weights,
        size: Bytes,
        state: State,
        update: Update,
        buckets: Buckets,
        *,
        stage: int,
        ranks: int,
        rank: int | None = None,
        offload: Offload = NOTHING,
    ) -> None:
        self._weights, self._size, self._buckets = weights, size, buckets
        self._state, self._update = state, update
        self._stage, self._offloaded = stage, offload.optimizer
        self._each_pass = stage == 2 or buckets.overlap or size.weight != size.summed or self._offloaded
        self.alike = self._each_pass
        self._partitions = [
            ceil(sum(weight.elements for weight in group) / (ranks * _ALIGNMENT)) * _ALIGNMENT
            for group in weights.groups
        ]
        self._ranks_of = {
            weight: ranks_of
            for group, partition in zip(weights.groups, self._partitions, strict=True)
            for weight, ranks_of in _placed(group, partition)
        }
        if rank is None:
            rank = self._fullest(ranks)
        self._own = [
            _overlapping(group, partition * rank, partition * (rank + 1))
            for group, partition in zip(weights.groups, self._partitions, strict=True)
        ]
        self._here = {weight: count for own in self._own for weight, count in own}
        # Bytes of tensors that are alive, of those that are freed before the end of the step.
        self._bucket = self._filled = self._partition = self._sums = 0
        self._waiting: list[Weight] = []
        self._too_large: Weight | None = None
        self._whole: set[Weight] = set()
        self._summed = False

    def _fullest(self, ranks: int) -> int:
        """A rank whose partitions touch the most elements."""
        touched = [0] * ranks
        for weight, places in self._ranks_of.items():
            for rank in places:
                touched[rank] += weight.elements
        return touched.index(max(touched))

    def held(self) -> dict[str, int]:
        """See `Holder.held`."""
        size = self._size
        weights = self._weights.as_wide(size.weight) + self._weights.buffers
        if self._offloaded:
            return {WEIGHTS: weights, GRADIENT_BUFFER: self._gradient_buffer()}
        return {WEIGHTS: weights, MASTERS: sum(self._partitions) * size.master, STATE: self._states()}

    def on_host(self) -> int:
        """See `Holder.on_host`: also sums of gradients, the ones that the optimiser reads, and new 16-bit weights."""
        if not self._offloaded:
            return 0
        size = self._size
        return sum(self._partitions) * (3 * size.master + size.weight) + self._states() + self._gradient_buffer()

    def _gradient_buffer(self) -> int:
        """Bytes of the largest gradient, for which there is room on both sides."""
        return max(weight.elements for group in self._weights.groups for weight in group) * self._size.weight

    def _states(self) -> int:
        return sum(self._state(partition, self._size.master) for partition in self._partitions)

    def gradient(self, weight: Weight) -> Iterator[int]:
        """See `Holder.gradient`."""
        if weight not in self._whole:
            yield weight.elements * self._size.weight
        yield from self._open_bucket()
        if self._stage == 2:
            yield from self._into_bucket(weight)
        else:
            self._whole.add(weight)

    def end_of_pass(self) -> Iterator[int]:
        """See `Holder.end_of_pass`."""
        if self._each_pass:
            yield from self._reduced()

    def step(self) -> Iterator[int]:
        """See `Holder.step`."""
        if not self._each_pass:
            yield from self._reduced()
        size = self._size
        if self._offloaded:
            return
        for index, partition in enumerate(self._partitions):
            flat = yield from flattened(partition, size)
            if size.weight != size.summed or index == len(self._partitions) - 1:
                # Sums that are views of one tensor end with the last of them.
                freed = self._sums_of(index) if size.weight != size.summed else self._sums
                yield -freed
                self._sums -= freed
            yield (needed := self._update(partition))
            yield -needed
            yield -flat
        self._summed = False

    def _open_bucket(self) -> Iterator[int]:
        if self._bucket == 0:
            one = self._buckets.reduce * self._size.weight
            self._bucket = one * (2 if self._buckets.overlap else 1)
            yield one
            yield self._bucket - one

    def _into_bucket(self, weight: Weight) -> Iterator[int]:
        if self._filled + weight.elements > self._buckets.reduce:
            yield from self._exchanged()
        if weight.elements > self._buckets.reduce:
            self._too_large = weight
        else:
            yield -weight.elements * self._size.weight
        self._filled += weight.elements
        self._waiting.append(weight)

    def _exchanged(self) -> Iterator[int]:
        """Reduce what waits in the bucket, and keep what is of this rank's partition."""
        if not self._waiting:
            return
        copied = self._copied() * self._size.weight
        yield copied
        yield -copied
        for weight in self._waiting:
            if self._offloaded and weight in self._here:
                yield from self._looked_at(weight)
            elif weight in self._here and self._partition == 0:
                self._partition = sum(own.elements for own in self._here) * self._size.weight
                yield self._partition
            if weight is self._too_large:
                yield -weight.elements * self._size.weight
        self._waiting.clear()
        self._filled, self._too_large = 0, None

    def _looked_at(self, weight: Weight) -> Iterator[int]:
        """Temporaries of a gradient's norm in float64, of the search for infinities, and of what goes to the host."""
        size, own = self._size, self._here[weight]
        cast = size.master if size.master != size.weight else 0
        search = _SEARCH + (_AS_FLOAT if size.weight != _AS_FLOAT else 0)
        for needed in (8 * own, search * weight.elements, cast * own):
            yield needed
            yield -needed

    def _copied(self) -> int:
        """Elements that are copied to be exchanged: all, unless they are one rank's in one piece."""
        pieces = [rank for weight in self._waiting for rank in self._ranks_of[weight]]
        return self._filled if len(set(pieces)) > 1 else 0

    def _reduced(self) -> Iterator[int]:
        """Exchange what is left, and add this rank's partition to its sums."""
        for weight in [weight for group in self._weights.groups for weight in group if weight in self._whole]:
            yield from self._into_bucket(weight)
        self._whole.clear()
        yield from self._exchanged()
        yield -self._bucket
        self._bucket = 0
        if self._offloaded:
            return
        if self._size.weight == self._size.summed:
            if self._summed:
                yield -self._partition
            else:
                self._sums = self._partition
        else:
            if not self._summed:
                self._sums = sum(map(self._sums_of, range(len(self._partitions))))
                yield self._sums
            yield -self._partition
        self._summed, self._partition = True, 0

    def _sums_of(self, index: int) -> int:
        """Bytes of a group's sums that are tensors of their own: of whole parameters where a piece is enough."""
        own = sum(count for _, count in self._own[index])
        return max(own, self._partitions[index] if own else 0) * self._size.summed


_ALIGNMENT = 2
"""Elements of a partition are a multiple of it."""

_AS_FLOAT = 4
_SEARCH = 3 + _AS_FLOAT
"""Bytes for each element of a gradient in which DeepSpeed looks for infinities: three masks and their float32; where
it is no float32, one of it beside."""


def _placed(group: tuple[Weight, ...], partition: int) -> Iterator[tuple[Weight, range]]:
    """The parameters of a group, and of each the ranks that have a range of it."""
    start = 0
    for weight in group:
        end = start + weight.elements
        yield weight, range(start // partition, (end - 1) // partition + 1)
        start = end


def _overlapping(group: tuple[Weight, ...], low: int, high: int) -> list[tuple[Weight, int]]:
    """The parameters of which a range of their concatenation has elements, and how many."""
    found, start = [], 0
    for weight in group:
        count = min(start + weight.elements, high) - max(start, low)
        if count > 0:
            found.append((weight, count))
        start += weight.elements
    return found
