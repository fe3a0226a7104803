import pytest

from framework.config import EarlyStoppingConfig
from framework.training.early_stopping import EarlyStopping


def stopped_after(figures, state=None, metric="loss", **settings):
    """Number of evaluations after which it stops; None if it does not."""
    stopping = EarlyStopping(EarlyStoppingConfig(metric=metric, **settings))
    stopping.load_state_dict(state)
    for count, figure in enumerate(figures, start=1):
        stopping.observe(10 * count, {metric: figure, "tokens": 5})
        if stopping.reason():
            return count
    return None


@pytest.mark.parametrize(
    ("figures", "settings", "expected"),
    [
        ([3.0, 2.0, 2.5, 2.1, 9.0], {"patience": 2}, 4),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 1.8], {"patience": 2}, None),
        ([3.0, 3.0], {"patience": 1}, 2),
        ([3.0, 2.95, 2.9, 2.85], {"patience": 2, "min_delta": 0.125}, 3),
        ([3.0, 2.875, 3.0], {"patience": 2, "min_delta": 0.125}, 3),
        ([3.0, 2.8, 2.6, 2.4], {"patience": 1, "min_delta": 0.125}, None),
        ([None, None, None], {"patience": 3}, 3),
        ([None, 2.0, None, 1.0], {"patience": 2}, None),
    ],
)
def test_it_stops_after_so_many_evaluations_without_improvement(figures, settings, expected):
    assert stopped_after(figures, **settings) == expected


def test_of_another_metric_more_is_better():
    assert stopped_after([0.1, 0.5, 0.4, 0.55], metric="accuracy", patience=2, min_delta=0.1) == 4


def test_the_reason_names_the_best():
    stopping = EarlyStopping(EarlyStoppingConfig(patience=2))
    for step, loss in ((10, 2.0), (20, 1.25), (30, 1.5)):
        stopping.observe(step, {"loss": loss})
        assert stopping.reason() is None
    stopping.observe(40, {"loss": 1.25})
    assert stopping.reason() == (
        "the evaluation loss was best at step 20, 1.25, and did not improve in the 2 evaluations after it "
        "(training.early_stopping)"
    )


def test_the_state_goes_on_with_the_patience_of_the_run():
    stopping = EarlyStopping(EarlyStoppingConfig(patience=2))
    for step, loss in ((10, 1.0), (20, 2.0), (30, 2.0)):
        stopping.observe(step, {"loss": loss})
    state = stopping.state_dict()
    assert state == {"metric": "loss", "best": 1.0, "best_step": 10, "evaluations": 2}
    same, patient, other = (
        EarlyStopping(EarlyStoppingConfig(**settings))
        for settings in ({"patience": 2}, {"patience": 3}, {"patience": 1, "metric": "accuracy"})
    )
    for stopping in (same, patient, other):
        stopping.load_state_dict(state)
    assert same.reason() and not patient.reason() and not other.reason()
    patient.observe(40, {"loss": 1.5})
    assert patient.reason()
    assert stopped_after([2.0, 2.0], patience=2, state=None) is None


def test_without_settings_nothing_is_counted():
    stopping = EarlyStopping(None)
    stopping.load_state_dict({"metric": "loss", "best": 1.0, "best_step": 10, "evaluations": 99})
    stopping.observe(10, {"loss": 2.0})
    assert stopping.reason() is None and stopping.state_dict() is None
