"""The order of a mixture: which source each draw comes from, and which of its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from framework.data.order import epoch_order


def shares_of(weights: Sequence[float]) -> np.ndarray:
    """Weights divided by their sum, float64 `[sources]`."""
    return np.asarray(weights, np.float64) / math.fsum(weights)


def interleave(shares: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources of draws `start` to `start + count` of an endless mixture, evenly spread rather than drawn at random.

    Draw number j of a source is due at (j + 1/2) / share, and draws come in the order in which they are due, ties in
    the order of the sources. The first n draws are so shared out as the Webster (Sainte-Laguë) method gives n seats to
    parties: nowhere does a source's count leave its share of the draws so far by more than 1/2 + share * sources / 2,
    and hardly ever by as much as 1. Any part of the sequence can be made without what comes before it.

    Args:
        shares: Positive, their sum is 1, `[sources]`.
        start: The first draw, counted from 0.
        count: Number of draws.

    Returns:
        For each draw its source, and the number of earlier draws from that source, int64 `[count]` each.
    """
    # At time t, floor(share * t + 1/2) draws of a source are due: all sources together, t give or take sources / 2.
    slack = len(shares) + 1
    firsts = np.floor(shares * max(0, start - slack) + 0.5).astype(np.int64)
    lasts = np.floor(shares * (start + count + slack) + 0.5).astype(np.int64)
    source = np.repeat(np.arange(len(shares)), lasts - firsts)
    number = np.concatenate([np.arange(first, last) for first, last in zip(firsts, lasts, strict=True)])
    due = np.lexsort((source, (number + 0.5) / shares[source]))
    due = due[start - firsts.sum() :][:count]
    return source[due], number[due]


def mixture_order(sizes: Sequence[int], shares: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Draw indices of an epoch of a mixture, int64 `[samples]`.

    An epoch of a mixture is as many draws as the sources have samples together. Every source goes through epochs of
    its own, each in a new order, from one epoch of the mixture to the next: none of its samples comes again before all
    have come. A draw index is own epoch * samples + sample index, samples counted over all sources, so none occurs
    twice.

    Args:
        sizes: Samples of each source.
        shares: Share of each source in the draws; their sum is 1.
        seed: Of the orders.
        epoch: Of the mixture.
    """
    samples = sum(sizes)
    source, number = interleave(shares, epoch * samples, samples)
    draws = np.empty(samples, np.int64)
    for index, (size, first) in enumerate(zip(sizes, np.cumsum([0, *sizes]), strict=False)):
        places = source == index
        own_epoch, place = np.divmod(number[places], size)
        if len(place):
            begun = range(own_epoch[0], own_epoch[-1] + 1)
            orders = [epoch_order(size, seed=seed, epoch=own, source=index) for own in begun]
            draws[places] = own_epoch * samples + first + np.stack(orders)[own_epoch - own_epoch[0], place]
    return draws
