"""What ZeRO's stage 3 allocates beside the passes: gathered weights and reduced gradients. Must not import torch.

The model follows DeepSpeed 0.19's `partitioned_param_coordinator.py` and `stage3.py` change by change: what is gathered
ahead, and how long it stays, depends on the sizes of the modules that come next, which is no polynomial.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import ceil

from framework.planner.course import Place
from framework.planner.held import Weight, Weights
from framework.planner.zero import (
    GRADIENTS,
    MASTERS,
    NOTHING,
    STATE,
    WEIGHTS,
    Buckets,
    Bytes,
    Offload,
    State,
    Update,
    flattened,
)


class PartitionedWeights:
    """Stage 3: a rank has a partition of every weight, and whole weights around their use.

    Args:
        weights: of the model.
        size: bytes of an element.
        state: of the optimiser.
        update: of the optimiser.
        buckets: of the run.
        ranks: that the model is partitioned over.
        trace: the modules of a micro-batch in the order in which they are entered, from `trace_of`.
        offload: what is on the host.
    """

    alike = True

    def __init__(
        self,
        weights: Weights,
        size: Bytes,
        state: State,
        update: Update,
        buckets: Buckets,
        *,
        ranks: int,
        trace: Sequence[Place],
        offload: Offload = NOTHING,
    ) -> None:
        self._offload = offload
        self._weights, self._size, self._buckets, self._ranks = weights, size, buckets, ranks
        self._state, self._update = state, update
        modules = [weights.by_module.get(module, ()) for module in trace]
        self._order = [(weight, step) for step, own in enumerate(modules) for weight in own]
        self._uses: dict[Weight, list[int]] = {}
        for weight, step in self._order:
            self._uses.setdefault(weight, []).append(step)
        # Elements of the modules before each step.
        self._before = [0, *accumulate(sum(weight.elements for weight in own) for own in modules)]
        self._small = {weight for weight in weights.all if weight.elements <= buckets.persistence}
        self._gathered = set(self._small)
        self._live: dict[Weight, int] = {}
        self._shared: dict[Weight, _Exchange] = {}
        self._users: dict[Weight, set[Place]] = {weight: set() for weight in weights.all}
        self._filled = 0
        self._waiting: list[Weight] = []
        self._too_large: set[Weight] = set()

    def held(self) -> dict[str, int]:
        """See `Holder.held`; gradients are there all the time, with the bucket that they are reduced in."""
        size = self._size
        whole = sum(weight.as_wide(size.weight) for weight in self._small) + self._weights.buffers
        bucket = self._buckets.reduce * size.weight
        weights, masters, state, gradients = self._partitions()
        if self._offload.weights:
            weights = sum(self._part(w) * self._width(w) for w in self._weights.all if not self._is_on_host(w))
        if self._offload.optimizer:
            masters = state = gradients = 0
        return {WEIGHTS: weights + whole, MASTERS: masters, STATE: state, GRADIENTS: gradients + bucket}

    def on_host(self) -> int:
        """See `Holder.on_host`: also the gradients that the optimiser reads, beside the sums."""
        _, masters, state, gradients = self._partitions()
        host = 0
        if self._offload.optimizer:
            host += 2 * masters + state + gradients
        if self._offload.weights:
            host += sum(self._part(w) * self._width(w) for w in self._weights.all if self._is_on_host(w))
        return host

    def _partitions(self) -> tuple[int, int, int, int]:
        """Bytes of this rank's parts of weights, master weights, optimiser state and sums of gradients."""
        size = self._size
        trained = sum(self._part(weight) for weight in self._weights.all if weight.trained)
        weights = sum(self._part(weight) * self._width(weight) for weight in self._weights.all)
        state = sum(self._state(part, size.master) for part in self._sub_groups())
        return weights, trained * size.master, state, trained * size.summed

    def _is_on_host(self, weight: Weight) -> bool:
        """Whether this rank's part of a weight is: small ones stay whole, and of frozen ones the part, too."""
        return self._offload.weights and (weight.trained or weight not in self._small)

    def begin(self) -> Iterator[int]:
        """See `Holder.begin`."""
        self._step = self._available = 0
        self._queue = deque(self._order)
        self._last_use: dict[Weight, int] = {}
        yield from ()

    def fetch(self, module: Place) -> Iterator[int]:
        """See `Holder.fetch`."""
        # Many modules have no weights of their own.
        if own := self._weights.by_module.get(module, ()):
            yield from self._gather([weight for weight in own if weight not in self._gathered])
            for weight in own:
                self._users[weight].add(module)
                if weight in self._shared:
                    yield from self._shared.pop(weight).taken(weight, self)
            # What is prefetched is left out of what has been before.
            ahead = sum(self._last_use.get(weight, -1) < self._step for weight in own)
            for _ in range(min(ahead, len(self._queue))):
                weight, step = self._queue.popleft()
                self._last_use[weight] = step
        yield from self._prefetch()
        self._step += 1

    def release(self, module: Place) -> Iterator[int]:
        """See `Holder.release`."""
        for weight in self._weights.by_module.get(module, ()):
            self._users[weight].discard(module)
            late = self._last_use.get(weight, -1) > self._step
            if weight in self._small or late or self._users[weight] or weight not in self._gathered:
                continue
            if not self._is_used_soon(weight):
                yield from self._free(weight)

    def gradient(self, weight: Weight) -> Iterator[int]:
        """See `Holder.gradient`."""
        bucket = self._buckets.reduce
        yield weight.elements * self._size.weight
        if self._filled + weight.elements > bucket and self._waiting:
            yield from self._exchanged()
        if self._filled + weight.elements <= bucket:
            yield -weight.elements * self._size.weight
        else:
            self._too_large.add(weight)
        self._filled += weight.elements
        self._waiting.append(weight)

    def end_of_pass(self) -> Iterator[int]:
        """See `Holder.end_of_pass`; modules whose input has no gradient are left now."""
        yield from self._exchanged()
        for weight, users in self._users.items():
            if users:
                users.clear()
                if weight not in self._small:
                    yield from self._free(weight)

    def step(self) -> Iterator[int]:
        """See `Holder.step`."""
        for weight in [*self._gathered]:
            yield from self._free(weight)
        if self._offload.optimizer:
            return
        for part in self._sub_groups():
            flat = yield from flattened(part, self._size)
            yield (needed := self._update(part))
            yield -needed
            yield -flat
        for weight in self._weights.all:
            if weight in self._small:
                yield self._whole(weight)
                self._gathered.add(weight)

    def _part(self, weight: Weight) -> int:
        return ceil(weight.elements / self._ranks)

    def _width(self, weight: Weight) -> int:
        return 1 if weight.packed else self._size.weight

    def _whole(self, weight: Weight) -> int:
        return self._part(weight) * self._ranks * self._width(weight)

    def _gather(self, wanted: list[Weight]) -> Iterator[int]:
        if not wanted:
            return
        self._available += sum(weight.elements for weight in wanted)
        self._gathered.update(wanted)
        if self._buckets.one_by_one or len(wanted) == 1:
            for weight in wanted:
                self._live[weight] = self._whole(weight)
                yield self._live[weight]
                yield from self._brought([weight])
            return
        for width in (1, self._size.weight):
            # Those of one dtype are gathered together.
            if alike := [weight for weight in wanted if self._width(weight) == width]:
                exchange = _Exchange(alike, sum(map(self._whole, alike)))
                self._shared.update(dict.fromkeys(alike, exchange))
                yield exchange.bytes
                yield from self._brought(alike)

    def _brought(self, weights: Sequence[Weight]) -> Iterator[int]:
        """Copies of parts that are on the host."""
        copied = sum(self._part(weight) * self._width(weight) for weight in weights if self._is_on_host(weight))
        yield copied
        yield -copied

    def _prefetch(self) -> Iterator[int]:
        bucket = 1 if self._buckets.one_by_one else self._buckets.prefetch
        most = min(self._buckets.max_live - self._available, bucket)
        wanted: list[Weight] = []
        elements = 0
        while self._queue and elements < most:
            weight, step = self._queue.popleft()
            self._last_use[weight] = max(self._last_use.get(weight, -1), step)
            if weight not in self._gathered and weight not in wanted:
                wanted.append(weight)
                elements += weight.elements
        if wanted:
            yield from self._gather(wanted)

    def _free(self, weight: Weight) -> Iterator[int]:
        self._gathered.discard(weight)
        self._available -= weight.elements
        yield -self._live.pop(weight, self._whole(weight) if weight in self._small else 0)

    def _is_used_soon(self, weight: Weight) -> bool:
        """Whether a weight is one of the modules that come next, up to the reuse distance."""
        uses = self._uses.get(weight, [])
        coming = bisect_left(uses, self._step)
        if coming == len(uses):
            return False
        return self._before[uses[coming]] - self._before[self._step] < self._buckets.max_reuse

    def _exchanged(self) -> Iterator[int]:
        if not self._waiting:
            return
        size, parts = self._size, sum(map(self._part, self._waiting))
        alone = len(self._waiting) == 1 and self._waiting[0].elements % self._ranks == 0
        copied = 0 if alone else parts * self._ranks * size.weight
        summed = parts * size.summed if size.summed != size.weight else 0
        yield copied
        yield summed
        yield -copied
        if self._offload.optimizer:
            yield (added := self._added_to())
            yield -added
        yield -summed
        yield -sum(weight.elements for weight in self._too_large) * size.weight
        self._waiting.clear()
        self._too_large.clear()
        self._filled = 0

    def _added_to(self) -> int:
        """Bytes of sums that are brought from the host to be added to: at most those of two weights in a row."""
        parts = [self._part(weight) for weight in self._waiting]
        return max(map(sum, zip(parts, [0, *parts[:-1]], strict=True))) * self._size.summed

    def _sub_groups(self) -> Iterator[int]:
        """Elements of what is updated at a time."""
        for group in self._weights.groups:
            part = 0
            for weight in group:
                part += self._part(weight)
                if part >= self._buckets.sub_group:
                    yield part
                    part = 0
            yield part


class _Exchange:
    """Weights that are gathered into one buffer, copied out when the first is used; it lasts until the last is."""

    def __init__(self, weights: list[Weight], size: int) -> None:
        self.bytes = size
        self._weights, self._left = weights, set(weights)
        self._copied = False

    def taken(self, weight: Weight, holder: PartitionedWeights) -> Iterator[int]:
        if not self._copied:
            self._copied = True
            for each in self._weights:
                holder._live[each] = each.as_wide(holder._size.weight)
                yield holder._live[each]
        self._left.discard(weight)
        if not self._left:
            yield -self.bytes
