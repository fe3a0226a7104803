import math

import pytest

from framework.training.schedule import learning_rate, scheduled_rate

COMMON = {"peak": 2.0, "max_steps": 11, "final_ratio": 0.1}


def rates(kind, warmup_steps, **changes):
    options = COMMON | changes
    return [
        learning_rate(step, kind=kind, warmup_steps=warmup_steps, **options)
        for step in range(1, options["max_steps"] + 1)
    ]


def test_constant_is_the_peak_after_a_linear_rise():
    assert rates("constant", 4) == [0.5, 1.0, 1.5] + [2.0] * 8


def test_linear_falls_in_equal_steps_to_the_final_ratio():
    expected = [2.0 - 1.8 * i / 10 for i in range(11)]
    assert rates("linear", 0) == pytest.approx(expected, rel=1e-12)


def test_cosine_is_half_a_wave_from_the_peak_to_the_final_ratio():
    expected = [2.0 / 3, 4.0 / 3] + [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2) for i in range(9)]
    assert rates("cosine", 3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ends_are_exact(kind):
    values = rates(kind, 5, final_ratio=0.0)
    assert values[4] == 2.0
    assert values[-1] == pytest.approx(0.0, abs=1e-15)


def test_a_warm_up_as_long_as_the_run_never_falls():
    assert rates("cosine", 11)[-1] == 2.0
    assert rates("cosine", 0, max_steps=1) == [2.0]


def test_an_unknown_kind_names_the_option():
    with pytest.raises(ValueError, match=r"schedule\.kind"):
        rates("square", 0)


def test_a_warm_up_can_be_a_share_of_the_steps(make_config):
    config = make_config(schedule__warmup_ratio=0.25, training__max_steps=10)
    # A quarter of ten steps, rounded up, is three.
    expected = [0.01 / 3, 0.02 / 3, 0.01]
    assert [scheduled_rate(config, step) for step in (1, 2, 3)] == pytest.approx(expected, rel=1e-12)
