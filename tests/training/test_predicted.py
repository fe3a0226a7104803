"""Which plan is tried after memory ran out, and what is said of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from framework.sharding.protocol import Held
from framework.training.predicted import PeakCheck, advice, held_by_kind, next_plan, requested_bytes

GIB = 1 << 30


def fallback(peak: float, **overrides: Any) -> dict[str, Any]:
    return {
        "overrides": {"selection.ratio": 0.5, "training.micro_batch_size": 4} | overrides,
        "fidelity_class": "context detached",
        "peak_allocated_bytes": round(peak * GIB),
        "peak_reserved_bytes": round(1.25 * peak * GIB),
    }


def plan(*fallbacks: dict[str, Any]) -> dict[str, Any]:
    """A plan of 64 GiB, 80 GiB reserved, of a budget of 90 GiB, which are 72 allocated."""
    first = fallback(64)
    chosen = {name: first[name] for name in ("fidelity_class", "peak_allocated_bytes", "peak_reserved_bytes")}
    return {
        "budget_bytes": 90 * GIB,
        "chosen": chosen | {"binding_phase": "loss"},
        "overrides": first["overrides"],
        "fallbacks": [*fallbacks],
    }


@pytest.mark.parametrize(
    ("needed", "expected", "should_do"),
    [
        (None, 60, True),  # nobody counted
        (65, 60, True),  # 1 above the prediction: it has to be below 65 - 1
        (69, 60, True),  # below 69 - 5
        (76, 50, True),  # below the budget of 72, less 12
        (52, 50, True),  # the device had less than the plan took it to have
        (50, 40, True),
        (200, 40, False),
    ],
)
def test_a_plan_is_tried_that_would_have_fitted(needed, expected, should_do):
    found, expected_to_do = next_plan(plan(*map(fallback, (60, 50, 40))), needed and needed * GIB)
    assert (found["peak_allocated_bytes"], expected_to_do) == (expected * GIB, should_do)


def test_what_is_held_is_counted_once_and_the_rest_is_the_difference():
    weights, gradients = torch.zeros(1 << 18), torch.zeros(1 << 17)
    held = Held([weights, weights[:100]], [gradients], [torch.zeros(1 << 17, device="meta")])
    kinds = held_by_kind(held, torch.device("cpu"))
    assert kinds == {"weights": 1 << 20, "gradients": 1 << 19, "optimizer state": 0}
    lines = advice(plan(fallback(60)), kinds, reached=3 << 20, requested=1 << 20)
    assert lines == [
        "planned: 64.00 GiB at the peak (loss), of 90.00 GiB that a rank may take",
        "reached: 3.00 MiB, and 1.00 MiB more was asked for",
        "held: weights 1.00 MiB, gradients 512.00 KiB, optimizer state 0 B, activations and all else 1.50 MiB",
        "next plan: --set selection.ratio=0.5 --set training.micro_batch_size=4 (same result), 60.00 GiB at the peak "
        "instead of 64.00 GiB, the least that the config permits, which may be too much",
    ]


def test_another_result_is_said_and_so_is_that_nothing_takes_less():
    other = fallback(30, **{"selection.ratio": 0.25})
    assert "(another result: context detached)" in advice(plan(other), None, None, 0)[-1]
    assert advice(plan(), None, None, 0)[1:] == ["next plan: none, for nothing that the config permits takes less"]
    settings = {"chosen": {"peak_allocated_bytes": None}}
    assert advice(settings, None, None, 0) == []


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has", 5 << 29),
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has", 20 << 20),
        ("CUDA out of memory. Tried to allocate 512 bytes.", 512),
        ("NCCL says no", 0),
    ],
)
def test_the_request_is_read_from_the_allocators_message(message, size):
    assert requested_bytes(torch.OutOfMemoryError(message)) == size


def test_only_the_second_step_of_a_start_is_compared_and_only_if_it_was_measured():
    said: list[str] = []
    given = {"chosen": {"peak_allocated_bytes": 1010}}
    sharding = SimpleNamespace(offloads=False)
    config: Any = SimpleNamespace(sha256=lambda: "hash", sharding=sharding)

    def check(predicted: dict[str, Any], step: int, measured: int | None) -> None:
        PeakCheck(predicted, config, torch.device("cpu"), said.append, after_step=4).observe(step, measured)

    check(given, 5, 1000)
    check(given, 7, 1000)
    check(given, 6, None)
    check({"chosen": {"peak_allocated_bytes": None}}, 6, 1000)
    sharding.offloads = True
    check(given, 6, 1000)
    sharding.offloads = False
    assert said == []
    check(given, 6, 1000)
    assert said == ["step 6 takes 1000 B at its peak; the plan's 1010 B is 1.00% above that"]
