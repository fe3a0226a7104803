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


def pack(lengths: Sequence[int] | np.ndarray, sequence_length: int) -> list[list[int]]:
    """Pack samples greedily, in the given order, into bins of `sequence_length` tokens.

    Best fit: a sample goes into the fullest of the open bins that has room, else into a new one; a bin is closed when
    it is full, or, as the fullest, when there are more than `OPEN_BINS`.

    Args:
        lengths: Tokens of each sample, none over `sequence_length`.
        sequence_length: Tokens of a bin.

    Returns:
        For each bin the places in `lengths` of its samples; bins in the order in which they were opened.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, bin) of the open bins, sorted
    for place, length in enumerate(np.asarray(lengths).tolist()):
        assert length <= sequence_length, f"sample {place} has {length} tokens, a bin {sequence_length}"
        found = bisect_left(rooms, (length, -1))
        if found < len(rooms):
            free, number = rooms.pop(found)
        else:
            free, number = sequence_length, len(bins)
            bins.append([])
        bins[number].append(place)
        if free > length:
            insort(rooms, (free - length, number))
            if len(rooms) > OPEN_BINS:
                rooms.pop(0)
    return bins
