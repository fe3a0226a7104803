"""Steps added up by hand, and what must hold whatever the numbers."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from timed_jobs import attentive, choose, job, rates
from torch.utils._python_dispatch import TorchDispatchMode

from framework.planner.rates import Rates
from framework.planner.timing import ADAMW_BYTES, EIGHT_BIT_BYTES, STOCHASTIC_BYTES, STOCHASTIC_KERNELS, TimeModel
from framework.planner.work import FULL
from framework.training.optimizer import StochasticAdamW

FORWARD = 1000 * 4 * 1000 * FULL.block + 250 * 500 * FULL.logit
BACKWARD = 1000 * 4 * 1000 * FULL.block_backward


def test_a_step_on_one_device():
    """A thousand tokens through four blocks of a million weights, and 250 of them through a head of half a million."""
    time = TimeModel(job()).step(choose(), rates())
    blocks, head = 2 * 4e6 * 1000 / 1e12, 2 * 5e5 * 250 / 1e12
    assert time.parts == pytest.approx(
        {
            # With the gradients that the head makes.
            "forward": blocks + 3 * head + FORWARD / 1e12,
            "backward": 2 * blocks + BACKWARD / 1e12,
            "recomputation": 0.0,
            "update": (ADAMW_BYTES + 3 * 4) * 5e6 / 1e12,
            "exchange": 0.0,
            "host_copies": 0.0,
        }
    )
    assert time.total == sum(time.parts.values())
    assert time.tokens_per_second == 1000 / time.total


def test_micro_batches_repeat_passes_and_add_gradients():
    model = TimeModel(job())
    one, three = (model.step(choose(accumulation=count), rates()) for count in (1, 3))
    assert (three.forward, three.backward) == pytest.approx((3 * one.forward, 3 * one.backward))
    # Each sum of float32 gradients reads two and writes one.
    assert three.update - one.update == pytest.approx(2 * 3 * 4 * 5e6 / 1e12)
    assert three.tokens == 3 * one.tokens == 3000


def test_few_rows_cost_as_much_as_reading_the_weights():
    model = TimeModel(job(sequence_length=1))
    time = model.step(choose(), rates())
    moved = 4 * 1000 * FULL.block + 0.25 * 500 * FULL.logit
    # The head's three times.
    assert time.forward == pytest.approx((4 * 5.5e6 + moved) / 1e12)


def test_the_host_may_be_slower_than_the_device():
    time = TimeModel(job()).step(choose(policy="checkpoint"), rates(kernel_seconds=1.0))
    assert (time.forward, time.recomputation, time.backward) == (4.0, 4.0, 4.0)


def test_what_is_recomputed():
    model = TimeModel(job())
    products, elementwise = 2 * 4e6 * 1000 / 1e12, 1000 * 4 * 1000 * FULL.block / 1e12
    checkpoint = model.step(choose(policy="checkpoint"), rates())
    assert checkpoint.recomputation == pytest.approx(products + elementwise)
    selected = {"policy": "selective", "strategy": "supervised", "ratio": 0.5}
    assert model.step(choose(**selected), rates()).recomputation == pytest.approx((products + elementwise) / 2)
    retained = model.step(choose(retain_linears=True, **selected), rates())
    assert retained.recomputation == pytest.approx(elementwise / 2)
    # Of a block's million weights it has 600,000.
    one = model.step(choose(retain_linears=("down",), **selected), rates())
    assert one.recomputation == pytest.approx((0.4 * products + elementwise) / 2)


@pytest.mark.parametrize(
    ("changes", "choice", "bytes_per_parameter"),
    [
        ({}, {}, ADAMW_BYTES + 12),
        ({"optimizer": "adamw_8bit"}, {}, EIGHT_BIT_BYTES + 12),
        ({"precision": "pure_bf16"}, {}, STOCHASTIC_BYTES + 6),
        # The master weights' 16-bit copies.
        ({"precision": "fp32_master"}, {"engine": "deepspeed", "zero_stage": 1}, ADAMW_BYTES + 12 + 6),
        ({"precision": "fp32_master"}, {"engine": "deepspeed", "zero_stage": 0}, ADAMW_BYTES + 12),
        ({"precision": "fp32_master"}, {"engine": "fsdp"}, ADAMW_BYTES + 12),
    ],
)
def test_an_update_moves_weights_gradients_and_moments(changes, choice, bytes_per_parameter):
    time = TimeModel(job(**changes)).step(choose(**choice), rates())
    assert time.update == pytest.approx(bytes_per_parameter * 5e6 / 1e12)


def test_ranks_share_the_update():
    model, whole = TimeModel(job()), (ADAMW_BYTES + 12) * 5e6 / 1e12
    for expected, choice in [
        (whole, choose(engine="deepspeed", zero_stage=0, ranks=8)),
        (whole / 8, choose(engine="deepspeed", zero_stage=1, ranks=8)),
        (whole / 8, choose(engine="fsdp", ranks=8)),
        (whole / 4, choose(engine="fsdp", ranks=8, replicas=2)),
    ]:
        assert model.step(choice, rates()).update == pytest.approx(expected)


def test_updates_on_the_host_share_its_memory():
    choice = choose(engine="deepspeed", zero_stage=2, ranks=8, offload_optimizer=True)
    # Four ranks a node, each with a quarter of 8e9 bytes a second.
    assert TimeModel(job()).step(choice, rates()).update == pytest.approx((ADAMW_BYTES + 12) * 5e6 / 8 / 2e9)


def test_exchanges_behind_a_pass_are_a_pipeline():
    """Blocks 0 to 3 wait for their gather; while one is computed, the next one's is under way."""
    model, choice = TimeModel(job()), choose(engine="fsdp", ranks=4, reshard_after_forward=False)
    for network in (1e7, 1e9, 1e11):
        made = rates(node_bytes=network)
        time, gather, reduce = model.step(choice, made), *(4 * 5e6 * 0.75 / network,) * 2
        waited = 0.0
        for compute, beside in ((time.forward, gather), (time.backward, reduce)):
            stages = [beside / 4, *(max(compute, beside) / 4 for _ in range(3)), compute / 4]
            waited += sum(stages) - compute
        assert time.exchange == pytest.approx(waited)
        assert time.hidden == pytest.approx(gather + reduce - waited)


def test_what_the_engine_does_not_overlap_is_added():
    model = TimeModel(job())
    first, second = (model.step(choose(engine="deepspeed", zero_stage=s, ranks=4), rates()) for s in (1, 2))
    assert first.exchange == pytest.approx((2 * 4 + 4) * 5e6 * 0.75 / 1e10)
    assert first.hidden == 0.0 < second.hidden
    assert second.exchange + second.hidden == pytest.approx(first.exchange)


def test_waiting_is_shared_out_between_exchanges_and_copies():
    choice = choose(engine="fsdp", ranks=4, offload_optimizer=True, offload_parameters=True)
    time = TimeModel(job()).step(choice, rates(matrix_flops=1e30, memory_bytes=1e30, operator_bytes=1e30))
    # Nothing to hide behind: gathers of 5 and 4 and a reduction of 5 million float32, and a quarter of it copied.
    assert time.exchange == pytest.approx(4 * 14e6 * 0.75 / 1e10)
    assert time.host_copies == pytest.approx(4 * 14e6 / 4 / 1e9)


def test_what_is_retained_on_the_host_takes_time_where_the_link_is_busy_for_longer_than_a_pass():
    """The last of four blocks need not come back."""
    choice = choose(policy="selective", strategy="supervised", ratio=0.5, placement="host", accumulation=2)
    plain = TimeModel(job()).step(choice, rates())
    forward, backward = plain.forward / 2, (plain.recomputation + plain.backward) / 2
    for sent in (1e3, 1e9 * forward, 3e9 * backward):
        time = TimeModel(job(), lambda choice, sent=sent: sent).step(choice, rates())
        over = [sent / 1e9, 0.75 * sent / 1e9]
        waited = sum(max(0.0, link - compute) for link, compute in zip(over, (forward, backward), strict=True))
        assert time.host_copies == pytest.approx(2 * waited)
        assert time.hidden == pytest.approx(2 * (sum(over) - waited))
        assert time.total == pytest.approx(plain.total + 2 * waited)


def test_retained_tensors_share_the_link_with_weights():
    choice = choose(engine="fsdp", offload_optimizer=True, offload_parameters=True, policy="selective")
    fast = rates(matrix_flops=1e30, memory_bytes=1e30, operator_bytes=1e30)
    alone, both = (TimeModel(job(), lambda _, sent=sent: sent).step(choice, fast) for sent in (0.0, 1e9))
    # Nothing to hide behind: a second to the host, and three quarters of one back.
    assert both.host_copies == pytest.approx(alone.host_copies + 1.75)


def every_choice():
    engines = [
        {"engine": "single"},
        *({"engine": "deepspeed", "zero_stage": stage, "ranks": 8} for stage in range(4)),
        *({"engine": "deepspeed", "zero_stage": s, "ranks": 8, "offload_optimizer": True} for s in (1, 2, 3)),
        {"engine": "fsdp", "ranks": 8},
        {"engine": "fsdp", "ranks": 8, "replicas": 2, "reshard_after_forward": False},
        {"engine": "fsdp", "ranks": 8, "offload_optimizer": True, "offload_parameters": True},
    ]
    policies = [
        {"policy": "all"},
        {"policy": "checkpoint"},
        {"policy": "selective", "strategy": "supervised", "ratio": 0.5},
        {"policy": "selective", "strategy": "uniform", "ratio": 0.5, "retain_linears": True},
    ]
    for engine, policy, accumulation in itertools.product(engines, policies, (1, 2)):
        yield choose(**engine, **policy, accumulation=accumulation)


@pytest.mark.parametrize("precision", ["fp32", "fp32_master", "pure_bf16"])
def test_faster_hardware_is_never_slower(precision):
    model = TimeModel(job(products=attentive(), precision=precision, sequence_length=64, hidden_size=64))
    base = rates(latency_seconds=1e-6, kernel_seconds=1e-6)
    names = [field.name for field in fields(Rates) if field.name != "ranks_per_node"]
    helped = set()
    for choice, name in itertools.product(every_choice(), names):
        faster = replace(base, **{name: getattr(base, name) * (0.5 if name.endswith("seconds") else 2)})
        before, after = model.step(choice, base).total, model.step(choice, faster).total
        assert after <= before
        helped |= {name} if after < before else set()
    assert helped == set(names)


@pytest.mark.parametrize("strategy", ["supervised", "uniform", "suffix"])
def test_a_larger_ratio_is_never_faster(strategy):
    model = TimeModel(job(products=attentive(), sequence_length=64, hidden_size=64))
    for choice in every_choice():
        if choice.policy == "selective":
            ratios = (0.1, 0.25, 0.5, 0.75, 1.0)
            times = [model.step(replace(choice, strategy=strategy, ratio=r), rates()).total for r in ratios]
            assert times == sorted(times) and times[-1] > times[0]


def test_one_rank_waits_for_no_other():
    model = TimeModel(job())
    for choice in every_choice():
        alone = replace(choice, ranks=1, replicas=1)
        assert model.step(alone, rates(latency_seconds=1.0)).exchange == 0.0


def test_predicting_imports_no_torch():
    code = "import framework.planner.timing, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Operators(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_an_update_issues_some_operators_for_each_tensor():
    counts = []
    for tensors in (3, 5):
        weights = [torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(tensors)]
        optimizer = StochasticAdamW(weights, lr=0.1, betas=(0.9, 0.95), eps=1e-8, seed=0)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            with Operators() as operators:
                optimizer.step()
        counts.append(operators.count)
    # The rest is clipping: a norm, and a product with a factor.
    assert 0.8 < (counts[1] - counts[0]) / 2 * 60 / 88 / STOCHASTIC_KERNELS < 1
