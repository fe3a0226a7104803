from __future__ import annotations

import itertools
import json

import pytest
import several_ranks
import torch

from framework.planner import probes
from framework.planner.calibration import calibrate
from framework.planner.hardware import cpu_device
from framework.planner.profile import FIGURES, load_profile
from framework.planner.stopwatch import MAX_ROUNDS, Stopwatch
from framework.sharding.place import Place
from framework.sharding.ranks import Ranks, joined_ranks

MIB = 2**20
CPU = torch.device("cpu")


class Clock:
    """Goes on by a fixed time at each look, and by what calls are said to take."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_the_median_of_rounds_of_repeated_calls():
    clock = Clock()
    durations = itertools.chain([9.0, 0.005], itertools.cycle([0.004, 0.004, 0.010, 0.010, 0.020, 0.020]))
    calls = []

    def call():
        calls.append(1)
        clock.now += next(durations)

    # 0.005 s: two calls a round; 0.105 s hold ten such rounds, whose calls take 4, 10 and 20 ms in turn.
    assert Stopwatch(CPU, 0.105, clock).seconds(call) == pytest.approx(0.010)
    assert len(calls) == 2 + 2 * 10


def test_a_call_beyond_the_limit_is_made_twice_only():
    clock, calls = Clock(), []

    def call():
        calls.append(1)
        clock.now += 3.0

    assert Stopwatch(CPU, 0.1, clock).seconds(call) == 3.0
    assert len(calls) == 2


def test_a_clock_that_stands_still_ends():
    calls = []
    assert Stopwatch(CPU, 0.1, lambda: 1.0).seconds(lambda: calls.append(1)) == 0.0
    assert len(calls) == 2 + 1000 * MAX_ROUNDS


# Two looks a round, so a round takes 0.02 s whatever is in it: one call, in as many rounds as the limit holds.
TICK = 0.02


def watch(limit=0.05):
    return Stopwatch(CPU, limit, Clock(TICK))


def test_rates_are_work_by_time():
    # 8 * 0.02 s is above the limit: the first size is the last.
    assert probes.large_product_rate(watch(), "float32") == (256, pytest.approx(2 * 256**3 / TICK))
    assert probes.few_rows_rate(watch(), "float32") == pytest.approx(2 * 128 * 512**2 / TICK)
    pairs = 4 * 512 * 513 / 2
    assert probes.attention_rate(watch(), "float32", masked=False) == pytest.approx(7 * 2 * 64 * pairs / TICK)
    assert probes.attention_rate(watch(), "float32", masked=True) == pytest.approx(7 * 2 * 64 * 4 * 512**2 / TICK)
    # Queries and outputs, keys and values of a quarter of the heads, and an MLP 3.5 times as wide.
    assert probes.block_operators(watch(), "float32") == pytest.approx(
        (TICK, 6 * 128 * 4 * 128**2 * (2 + 2 / 4 + 3 * 3.5), 7 * 2 * 4 * 128 * 128**2, 4 * 128 * 128)
    )
    assert probes.elementwise_rate(watch()) == pytest.approx(3 * 32 * MIB / TICK)
    assert probes.kernel_seconds(watch()) == pytest.approx(TICK / (8 * 60))
    assert probes.host_copy_rates(watch()) == pytest.approx((32 * MIB / TICK, 32 * MIB / TICK))


def test_the_largest_product_within_the_limit_counts(monkeypatch):
    monkeypatch.setattr(probes, "_product_seconds", lambda watch, dtype, rows, edge: edge**3 * 1e-9)
    for limit, edge in ((0.1, 256), (0.2, 512), (2.0, 1024), (20.0, 2048), (500.0, 2048)):
        assert probes.large_product_rate(watch(limit), "float32") == (edge, pytest.approx(2e9))


def test_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    probes.few_rows_rate(watch(), "tf32")
    assert torch.get_float32_matmul_precision() == before


def test_a_processor_is_measured_in_what_it_has(tmp_path):
    lines = []
    profile = calibrate(CPU, Ranks(), 3.0, say=lines.append, clock=Clock(TICK))
    kind = cpu_device()
    measured = {name for name in FIGURES if profile.measured(name)}
    assert measured == {
        "matrix_efficiency",
        "few_rows_efficiency",
        "attention_efficiency",
        "masked_attention_efficiency",
        "memory_efficiency",
        "operator_efficiency",
        "kernel_seconds",
        "host_to_device",
        "device_to_host",
    }
    assert set(profile.matrix_efficiency) == {"float32", "bfloat16", "float16"}
    assert profile.matrix_efficiency["float32"] * kind.fp32 == pytest.approx(2 * 256**3 / TICK)
    assert profile.memory_efficiency * kind.memory_bandwidth == pytest.approx(3 * 32 * MIB / TICK)
    assert (profile.device, profile.workspace_bytes, profile.reserved_ratio) == ("cpu", 0, 1.0)
    assert profile.host and profile.date and profile.versions["torch"] == torch.__version__
    assert sum(line.startswith("products in") for line in lines) == 3
    path = tmp_path / "machine.json"
    profile.save(path)
    assert load_profile(path) == profile


def test_what_there_is_no_time_for_stays_assumed():
    lines = []
    # The first look costs more than the whole time.
    profile = calibrate(CPU, Ranks(), 1.0, say=lines.append, clock=Clock(2.0))
    assert not any(profile.measured(name) for name in FIGURES)
    assert "no time is left for: products; it stays assumed" in lines


@pytest.mark.parametrize("selective", [False, True])
def test_the_probe_trains(selective):
    sizes = {"width": 64, "blocks": 2, "vocabulary": 100, "length": 16, "batch": 2, "steps": 3}
    state = torch.random.get_rng_state()
    losses = probes.train_probe(CPU, "float32", selective=selective, **sizes)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert losses[2] < losses[0] == pytest.approx(4.605, abs=0.15)  # ln 100 for random weights


def calibrate_ranks():
    probes.dtypes_of = lambda device, kind: ["float32"]  # for speed
    with joined_ranks(Place.of_environment(), timeout_seconds=60) as ranks:
        # The second rank is twice as slow.
        profile = calibrate(CPU, ranks, 6.0, say=lambda line: print("#", line), clock=Clock(TICK * (1 + ranks.rank)))
    kept = ("all_gather", "reduce_scatter", "kernel_seconds", "network")
    print(json.dumps({name: getattr(profile, name) for name in kept} | {"measured": profile.measured("all_gather")}))


@pytest.mark.multiprocess
def test_ranks_agree_on_the_slowest(tmp_path):
    ended = several_ranks.start(2, tmp_path, calibrate_ranks).wait(several_ranks.TIMEOUT_SECONDS)
    assert [end.code for end in ended] == [0, 0], ended[0].output
    first, second = (end.stdout for end in ended)
    figures = json.loads(first.splitlines()[-1])
    assert figures == json.loads(second.splitlines()[-1])
    assert figures["measured"] and figures["network"] is None
    assert figures["all_gather"] == figures["reduce_scatter"] == pytest.approx(4 * MIB / (2 * TICK))
    assert figures["kernel_seconds"] == pytest.approx(2 * TICK / (8 * 60))
    assert any(line.startswith("# all-gather:") for line in first.splitlines())
    assert not any(line.startswith("#") for line in second.splitlines())
