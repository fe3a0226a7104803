"""Seconds of exchanges and host copies against volumes that are added up by hand.

The job has 5 million parameters, 4 million of them in blocks. A rank sends 1e10 bytes a second inside a node, a node
4e9 to others, and a node has four ranks.
"""

from __future__ import annotations

import pytest
from timed_jobs import choose, job, rates

from framework.planner.choice import Choice
from framework.planner.exchange import Transfers
from framework.planner.rates import Rates
from framework.planner.work import Job, WorkModel

ATTRIBUTES = (
    "forward",
    "backward",
    "after_backward",
    "once",
    "forward_copies",
    "backward_copies",
    "copies_after_backward",
    "copies_once",
)


def transfers(of: Job, choice: Choice, hardware: Rates) -> Transfers:
    return Transfers(of, WorkModel(of).compute_bytes(choice), choice, hardware)


def found(of: Job, choice: Choice, hardware: Rates) -> dict[str, float]:
    """What is not zero."""
    made = transfers(of, choice, hardware)
    return {name: getattr(made, name) for name in ATTRIBUTES if getattr(made, name)}


def zero(stage: int, **changes) -> Choice:
    return choose(engine="deepspeed", zero_stage=stage, **changes)


# Four ranks on one node: 3/4 of the bytes at 1e10 a second.
SECONDS_PER_BYTE = 0.75 / 1e10
ALL, IN_BLOCKS = 5e6 * SECONDS_PER_BYTE, 4e6 * SECONDS_PER_BYTE


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        # All-reduces of float32, whatever the precision.
        ("fp32", 0, {"once": 2 * 4 * ALL}),
        ("pure_bf16", 0, {"once": 2 * 4 * ALL}),
        # An all-reduce of the gradients, an all-gather of the weights.
        ("fp32", 1, {"once": 2 * 4 * ALL + 4 * ALL}),
        ("pure_bf16", 1, {"once": 2 * 2 * ALL + 2 * ALL}),
        ("fp32_master", 1, {"after_backward": 2 * 2 * ALL, "once": 2 * ALL}),
        ("fp32", 2, {"backward": 2 * 4 * ALL, "once": 4 * ALL}),
        ("fp16", 2, {"backward": 2 * 2 * ALL, "once": 2 * ALL}),
        # Two gathers of the blocks, one of what lies outside; a reduce-scatter.
        ("fp32", 3, {"forward": 4 * ALL, "backward": 4 * IN_BLOCKS + 4 * ALL}),
        ("fp32_master", 3, {"forward": 2 * ALL, "backward": 2 * IN_BLOCKS + 2 * ALL}),
    ],
)
def test_deepspeeds_volumes(precision, stage, expected):
    assert found(job(precision=precision), zero(stage, ranks=4), rates()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("precision", "reshard", "expected"),
    [
        ("fp32", True, {"forward": 4 * ALL, "backward": 4 * IN_BLOCKS + 4 * ALL}),
        ("fp32_master", True, {"forward": 2 * ALL, "backward": 2 * IN_BLOCKS + 4 * ALL}),
        ("fp32_master", False, {"forward": 2 * ALL, "backward": 4 * ALL}),
        ("pure_bf16", True, {"forward": 2 * ALL, "backward": 2 * IN_BLOCKS + 4 * ALL}),
    ],
)
def test_fsdps_volumes(precision, reshard, expected):
    choice = choose(engine="fsdp", ranks=4, reshard_after_forward=reshard)
    assert found(job(precision=precision), choice, rates()) == pytest.approx(expected)


def test_adapters_are_reduced_alone_and_everything_is_gathered():
    choice = choose(engine="fsdp", ranks=4)
    adapter = 1e5 * SECONDS_PER_BYTE
    expected = {"forward": 2 * ALL, "backward": 2 * IN_BLOCKS + 4 * adapter}
    assert found(job(precision="fp32_master", trainable=100_000), choice, rates()) == pytest.approx(expected)


def test_quantised_weights_are_gathered_as_they_are_held():
    made = job(precision="fp32_master", trainable=0, quantized=3_000_000, quantized_bytes=1_600_000)
    held = (1_600_000 + 2 * 1_000_000) * SECONDS_PER_BYTE
    expected = {"forward": held + 2 * 1e6 * SECONDS_PER_BYTE, "backward": held}
    assert found(made, choose(engine="fsdp", ranks=4), rates()) == pytest.approx(expected)


def test_a_ring_over_nodes_is_as_fast_as_its_slowest_link():
    choice = zero(0, ranks=8)
    assert found(job(), choice, rates()) == pytest.approx({"once": 2 * 4 * 5e6 * 7 / 8 / 4e9})
    assert found(job(), choice, rates(network_bytes=1e12)) == pytest.approx({"once": 2 * 4 * 5e6 * 7 / 8 / 1e10})


@pytest.mark.parametrize(
    ("replicas", "shards", "shard_rate", "replica_rate"),
    [
        # A copy a node: four groups of two exchange a quarter of the gradients each, over one network.
        (2, 4, 1e10, 4e9 / 4),
        # Two copies a node: groups of four, two of each on a node; two groups share the network.
        (4, 2, 1e10, 4e9 / 2),
    ],
)
def test_copies_of_the_model_exchange_gradients_only(replicas, shards, shard_rate, replica_rate):
    choice = choose(engine="fsdp", ranks=8, replicas=replicas)
    scattered = (shards - 1) / shards / shard_rate
    summed = 2 * 4 * 5e6 / shards * (replicas - 1) / replicas / replica_rate
    expected = {"forward": 4 * 5e6 * scattered, "backward": 4 * (4e6 + 5e6) * scattered + summed}
    assert found(job(), choice, rates()) == pytest.approx(expected)


def test_whole_copies_on_every_rank():
    choice = choose(engine="fsdp", ranks=4, replicas=4)
    assert found(job(), choice, rates()) == pytest.approx({"backward": 2 * 4 * ALL})


def test_every_block_the_embedding_and_the_head_wait_for_a_collective():
    quick, slow = rates(), rates(latency_seconds=1.0)
    for choice, expected in [
        # Loss and norm are summed up once a step.
        (zero(0, ranks=4), {"once": 6 + 1}),
        (zero(3, ranks=4), {"forward": 6, "backward": 6 + 6, "once": 1}),
        (choose(engine="fsdp", ranks=4, reshard_after_forward=False), {"forward": 6, "backward": 6, "once": 1}),
    ]:
        before, after = found(job(), choice, quick), found(job(), choice, slow)
        differences = {name: after[name] - before.get(name, 0.0) for name in after}
        assert {name: value for name, value in differences.items() if value} == pytest.approx(expected)


LINK = 1e9


@pytest.mark.parametrize(
    ("stage", "parameters", "expected"),
    [
        (1, False, {"copies_after_backward": 4 * 1.25e6 / LINK, "copies_once": 2 * 1.25e6 / LINK}),
        (2, False, {"backward_copies": 4 * 1.25e6 / LINK, "copies_once": 2 * 1.25e6 / LINK}),
        (3, False, {"backward_copies": 2 * 4 * 1.25e6 / LINK, "copies_once": 2 * 1.25e6 / LINK}),
        (
            3,
            True,
            {"forward_copies": 2 * 1.25e6 / LINK, "backward_copies": (2 * 4 * 1.25e6 + 2 * 1e6) / LINK},
        ),
    ],
)
def test_deepspeeds_host_copies(stage, parameters, expected):
    choice = zero(stage, ranks=4, offload_optimizer=True, offload_parameters=parameters)
    copies = found(job(precision="fp32_master"), choice, rates())
    assert {name: copies[name] for name in copies if "copies" in name} == pytest.approx(expected)


def test_fsdp_copies_shards_of_float32():
    choice = choose(engine="fsdp", ranks=4, offload_optimizer=True, offload_parameters=True)
    copies = found(job(precision="fp32_master"), choice, rates())
    expected = {"forward_copies": 4 * 1.25e6 / LINK, "backward_copies": 4 * (1e6 + 1.25e6) / LINK}
    assert {name: copies[name] for name in copies if "copies" in name} == pytest.approx(expected)


def test_gathered_and_reduced_tensors_are_copied_on_the_device():
    sharded = transfers(job(precision="fp32_master"), choose(engine="fsdp", ranks=2), rates())
    assert (sharded.gather_traffic, sharded.backward_traffic) == (2 * 2 * 5e6, 2 * 2 * 4e6 + (2 + 4) * 5e6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_exchanges_nothing(stage):
    for choice in (choose(), zero(stage), choose(engine="fsdp")):
        assert found(job(), choice, rates(latency_seconds=1.0)) == {}
