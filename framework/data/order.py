"""The order of samples in an epoch, and how they are packed: pure functions of the data set, seed and epoch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

OPEN_BINS = 16
"""Bins that packing keeps open at a time: enough to fill them to 98 % where filling in order reaches 86 % (the embedded
default at 512 tokens; more bins gain nothing), few enough that samples stay near their place in the order."""


def epoch_order(samples: int, *, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """Sample indices of an epoch in the order of drawing, int64 `[samples]`: a permutation.

    `source` numbers the sources of a mixture, whose orders are independent; the only one of other data is 0.

    Made by sorting raw output of a counter-based generator, which numpy keeps the same between versions and machines
    (unlike `Generator.permutation`).
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch, source])).random_raw(samples)
    return np.argsort(keys, kind="stable")


class Bins(Sequence[np.ndarray]):
    """Numbers that were put into bins, compact: all in one array, bins as ranges of it."""

    def __init__(self, numbers: np.ndarray, bin_of: np.ndarray) -> None:
        """Put each of `numbers` into its bin, both int64 `[numbers]`, in their order; no bin is empty."""
        self._numbers = numbers[np.argsort(bin_of, kind="stable")]
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(bin_of))])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._numbers[self._bounds[index] : self._bounds[index + 1]]


def pack(lengths: Sequence[int] | np.ndarray, sequence_length: int, numbers: np.ndarray | None = None) -> Bins:
    """Pack samples greedily, in the given order, into bins of `sequence_length` tokens.

    Best fit: a sample goes into the fullest of the open bins that has room, else into a new one; a bin is closed when
    it is full, or, as the fullest, when there are more than `OPEN_BINS`.

    Args:
        lengths: Tokens of each sample, none over `sequence_length`.
        sequence_length: Tokens of a bin.
        numbers: What the bins hold for the samples, int64 `[samples]`; by default their places in `lengths`.

    Returns:
        Bins in the order in which they were opened.
    """
    bin_of = np.empty(len(lengths), np.int64)
    count = 0
    rooms: list[tuple[int, int]] = []  # (free tokens, bin) of the open bins, sorted
    for place, length in enumerate(np.asarray(lengths).tolist()):
        assert length <= sequence_length, f"sample {place} has {length} tokens, a bin {sequence_length}"
        found = bisect_left(rooms, (length, -1))
        if found < len(rooms):
            free, number = rooms.pop(found)
        else:
            free, number = sequence_length, count
            count += 1
        bin_of[place] = number
        if free > length:
            insort(rooms, (free - length, number))
            if len(rooms) > OPEN_BINS:
                rooms.pop(0)
    return Bins(np.arange(len(lengths)) if numbers is None else numbers, bin_of)
