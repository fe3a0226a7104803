from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from framework.data.mixture import interleave, mixture_order, shares_of
from framework.data.order import epoch_order

WEIGHTS = [[1, 1], [3, 1], [0.7, 0.2, 0.1], [5, 1, 1, 1, 1], [0.05, 0.95], [1, 2, 3, 4, 5, 6], [1]]


def one_by_one(weights: list[float], count: int) -> list[int]:
    """Draw by draw: the largest source takes what its rounded share of the draws so far lacks, else the next one."""
    shares = shares_of(weights)
    order = sorted(range(len(weights)), key=lambda each: (-weights[each], each))
    given = [0] * len(weights)
    draws = []
    for drawn in range(1, count + 1):
        left = drawn
        for rank, each in enumerate(order):
            due = math.floor(shares[each] / math.fsum(shares[other] for other in order[rank:]) * left + 0.5)
            if due > given[each]:
                given[each] += 1
                draws.append(each)
                break
            left -= given[each]
    return draws


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_draw_goes_to_the_first_source_that_lacks_one(weights: list[float]) -> None:
    source, number = interleave(shares_of(weights), 0, 300)
    expected = one_by_one(weights, 300)
    assert source.tolist() == expected
    assert number.tolist() == [expected[:place].count(each) for place, each in enumerate(expected)]


def test_a_simple_mixture_is_written_down() -> None:
    # It may not change between versions, or a resumed run would see other samples.
    source, number = interleave(shares_of([3, 1]), 0, 12)
    assert source.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert number.tolist() == [0, 1, 0, 2, 3, 4, 1, 5, 6, 7, 2, 8]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([1e308, 1e308], [0.5, 0.5]), ([1.5e308, 0.5e308, 1e308], [0.5, 1 / 6, 1 / 3]), ([5e-324, 5e-324], [0.5, 0.5])],
)
def test_weights_of_any_size_have_shares(weights: list[float], shares: list[float]) -> None:
    np.testing.assert_allclose(shares_of(weights), shares, rtol=1e-15)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_exact_quotients(weights: list[float]) -> None:
    # To the bit, since they are part of a data set's fingerprint.
    assert shares_of(weights).tolist() == [weight / math.fsum(weights) for weight in weights]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_any_part_of_the_sequence_can_be_made_alone(weights: list[float]) -> None:
    shares = shares_of(weights)
    whole = interleave(shares, 0, 500)
    for start in (0, 1, 2, 7, 100, 333, 495):
        for count in (1, 5, 500 - start):
            part = interleave(shares, start, count)
            assert all((a[start : start + count] == b).all() for a, b in zip(whole, part, strict=True))
    far = 10**9
    assert (interleave(shares, far, 64)[0][32:] == interleave(shares, far + 32, 32)[0]).all()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_hold_over_every_stretch_within_rounding(weights: list[float]) -> None:
    shares = shares_of(weights)
    source, _ = interleave(shares, 0, 2000)
    for each, share in enumerate(shares):
        excess = np.cumsum(source == each) - share * np.arange(1, 2001)
        assert np.abs(excess).max() < (0.5001 if each == shares.argmax() else 1.5)
        # That of any stretch is a difference of two of these.
        assert excess.max() - excess.min() < 2.5


@pytest.mark.parametrize("seed", [0, 5])
def test_each_source_goes_through_all_its_samples_before_any_comes_again(seed: int) -> None:
    sizes, shares = [3, 11, 6], shares_of([2, 1, 1])
    samples, epochs = sum(sizes), 9
    draws = np.concatenate([mixture_order(sizes, shares, seed=seed, epoch=epoch) for epoch in range(epochs)])
    assert len(draws) == len(set(draws.tolist())) == samples * epochs, "a draw index occurs once"
    first = 0
    for number, size in enumerate(sizes):
        drawn = [int(draw) for draw in draws if first <= draw % samples < first + size]
        for own in range(len(drawn) // size):
            turn = drawn[own * size : (own + 1) * size]
            order = epoch_order(size, seed=seed, epoch=own, source=number)
            assert turn == [own * samples + first + place for place in order]
        assert len(set(drawn)) == len(drawn)
        first += size
    counts = Counter(np.searchsorted(np.cumsum(sizes), draws % samples, side="right").tolist())
    assert counts == {0: 90, 1: 45, 2: 45}


def test_orders_of_sources_of_one_size_differ() -> None:
    orders = {tuple(epoch_order(20, seed=1, epoch=0, source=source)) for source in range(3)}
    assert len(orders) == 3
    assert tuple(epoch_order(20, seed=1, epoch=0)) in orders
