from __future__ import annotations

import itertools
import threading

import pytest

from framework.data.prefetch import ordered_map


def squared(number: int) -> int:
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    assert list(ordered_map(squared, range(20), workers=workers, ahead=4)) == [n * n for n in range(20)]
    assert list(ordered_map(squared, [], workers=workers, ahead=4)) == []


def test_a_slow_item_holds_back_the_results_behind_it() -> None:
    second_is_done = threading.Event()

    def wait_for_the_second(number: int) -> int:
        if number == 0:
            assert second_is_done.wait(30)
        else:
            second_is_done.set()
        return number

    assert list(ordered_map(wait_for_the_second, [0, 1], workers=2, ahead=1)) == [0, 1]


def test_items_are_begun_ahead_up_to_a_limit() -> None:
    taken = []
    items = (taken.append(number) or number for number in itertools.count())
    results = ordered_map(squared, items, workers=2, ahead=3)
    assert taken == []
    assert [next(results), next(results)] == [0, 1]
    assert taken == [0, 1, 2, 3, 4]
    results.close()


def test_without_workers_nothing_is_begun_ahead() -> None:
    taken = []
    items = (taken.append(number) or number for number in itertools.count())
    results = ordered_map(squared, items, workers=0, ahead=3)
    assert next(results) == 0
    assert taken == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_in_its_turn(workers: int) -> None:
    results = ordered_map(lambda number: 1 // number, [2, 1, 0, 1], workers=workers, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


def test_closing_drops_what_was_not_begun_and_ends_the_threads() -> None:
    going, begun, before = threading.Event(), [], threading.enumerate()

    def wait(number: int) -> int:
        begun.append(number)
        if number:
            assert going.wait(30)
        return number

    results = ordered_map(wait, itertools.count(), workers=1, ahead=5)
    assert next(results) == 0
    (thread,) = [thread for thread in threading.enumerate() if thread not in before]
    results.close()
    going.set()
    thread.join(30)
    assert not thread.is_alive()
    assert begun in ([0], [0, 1]), "one item may have been on its way"
