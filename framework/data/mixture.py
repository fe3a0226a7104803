"""The order of a mixture: which source each draw comes from, and which of its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from framework.data.order import epoch_order

LEAST_SHARE = 2.0**-53
"""A smaller share is lost in the count of draws, which floats hold exactly up to 2**53."""


def shares_of(weights: Sequence[float]) -> np.ndarray:
    """Weights divided by their sum, float64 `[sources]`; one that is too small beside the others becomes 0."""
    # By a power of two, which keeps every bit of a share and no sum too large for a float.
    scaled = np.ldexp(np.asarray(weights, np.float64), -math.frexp(max(weights))[1])
    return scaled / math.fsum(scaled)


def interleave(shares: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources of draws `start` to `start + count` of an endless mixture, evenly spread rather than drawn at random.

    Of the first n draws the largest source gets its share of n, rounded; of the draws that are left, the next largest
    gets its share, rounded; and so on. So the count of a source hardly leaves its share of the draws so far: never by
    more than 1/2 for the largest, and by less than 1.5 for all in mixtures of up to 40 sources that were tried. Any
    part of the sequence can be made without what comes before it.

    Args:
        shares: Positive, their sum is 1, `[sources]`.
        start: The first draw, counted from 0.
        count: Number of draws.

    Returns:
        For each draw its source, and the number of earlier draws from that source, int64 `[count]` each.
    """
    source, number = np.empty((2, count), np.int64)
    places = np.arange(count)
    # Of each draw that is still to be given to a source: how many such draws come before it in the whole sequence.
    before = np.arange(start, start + count)
    order = np.argsort(-shares, kind="stable")
    for rank, each in enumerate(order):
        share = shares[each] / math.fsum(shares[order[rank:]])
        own = np.floor(share * before + 0.5).astype(np.int64)
        taken = np.floor(share * (before + 1) + 0.5) > own
        source[places[taken]] = each
        number[places[taken]] = own[taken]
        places, before = places[~taken], (before - own)[~taken]
    return source, number


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
