import pytest

from framework.config import LossScaleConfig
from framework.sharding.loss_scale import LossScale

FINE, OVERFLOW = {"loss_finite": True, "gradients_finite": True}, {"loss_finite": True, "gradients_finite": False}
BAD_LOSS = {"loss_finite": False, "gradients_finite": False}


def follow(scale, what, times):
    return [(scale.value, scale.follow(**what)) for _ in range(times)]


def test_it_doubles_after_steps_without_overflow_and_halves_down_to_its_minimum():
    scale = LossScale(LossScaleConfig(initial=8.0, growth_interval=2, minimum=3.0))
    assert follow(scale, FINE, 5) == [(8.0, False), (8.0, False), (16.0, False), (16.0, False), (32.0, False)]
    falling = [(32.0, True), (16.0, True), (8.0, True), (4.0, True), (3.0, False), (3.0, False)]
    assert follow(scale, OVERFLOW, 6) == falling
    assert follow(scale, FINE, 3) == [(3.0, False), (3.0, False), (6.0, False)]


def test_a_loss_that_is_not_finite_leaves_it_as_it_is():
    scale, undisturbed = (LossScale(LossScaleConfig(initial=8.0, growth_interval=2)) for _ in range(2))
    follow(scale, FINE, 1)
    assert follow(scale, BAD_LOSS, 2) == [(8.0, False)] * 2
    follow(scale, FINE, 1)
    follow(undisturbed, FINE, 2)
    assert scale.state_dict() == undisturbed.state_dict() == {"scale": 16.0, "_growth_tracker": 0}


def test_an_overflow_starts_the_count_anew():
    scale = LossScale(LossScaleConfig(initial=8.0, growth_interval=3))
    follow(scale, FINE, 2)
    follow(scale, OVERFLOW, 1)
    assert follow(scale, FINE, 4) == [(4.0, False)] * 3 + [(8.0, False)]


def test_a_constant_stays():
    scale = LossScale(1024.0)
    assert follow(scale, FINE, 3000)[-1] == (1024.0, False)
    assert follow(scale, OVERFLOW, 2) == [(1024.0, False)] * 2
    scale.load_state_dict({"scale": 2.0, "_growth_tracker": 1})
    assert scale.value == 1024.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"growth_interval": 4}, [16.0, 16.0, 32.0, 32.0]),
        ({"growth_interval": 3}, [16.0, 32.0, 32.0, 32.0]),
        ({"growth_interval": 1}, [16.0, 32.0, 64.0, 128.0]),
        ({"minimum": 20.0}, [20.0] * 4),
    ],
)
def test_it_goes_on_from_what_was_saved_under_the_options_of_the_run(options, expected):
    saved = LossScale(LossScaleConfig(initial=8.0, growth_interval=4))
    follow(saved, FINE, 6)
    scale = LossScale(LossScaleConfig(**options))
    scale.load_state_dict(saved.state_dict())
    assert [value for value, _ in follow(scale, FINE, 4)] == expected


def test_without_a_setting_it_starts_at_two_to_the_sixteenth():
    assert LossScale().value == 65536.0
