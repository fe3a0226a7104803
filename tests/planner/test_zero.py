"""The models of what ZeRO allocates, against what DeepSpeed allocates, mark by mark."""

from __future__ import annotations

import pytest

from framework.config import Config
from framework.models.architecture import describe
from framework.models.configured import configured_empty_model
from framework.planner.choice import Choice
from framework.planner.course import Holder, told
from framework.planner.fake_ranks import first_of
from framework.planner.held import Weight, Weights
from framework.planner.holders import Holders
from framework.planner.marks import END_OF_PASS, FETCH, Mark
from framework.planner.naming import weights_of
from framework.planner.recording import Recording, record_step
from framework.planner.small_models import Widths, probe_batch
from framework.planner.zero import Buckets, Bytes, FlatPartitions, WholeGradients
from framework.sharding import deepspeed as engine_module
from framework.sharding.deepspeed_config import bucket_sizes
from framework.sharding.engines import model_sizes
from framework.training.parameter_groups import parameter_groups

MODEL = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
BATCH = Widths(8, 2, 16, 24, 152, 300, 4, 2, 16, 4, 4)

SCALARS = 1024
"""Bytes that norms, losses and counts may take, which the models leave out."""

Levels = list[tuple[Mark, int, int]]
"""Marks with the bytes of an engine at the peak from there to the next mark, and at its end."""


def config_of(stage: int, precision: str, ranks: int, policy: str, offload: str = "") -> Config:
    return Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"from_config": MODEL, "tokenizer": "unused"},
            "data": {"train": "unused", "sequence_length": 16},
            "optimizer": {"learning_rate": 1e-3, "precision": precision},
            "training": {"max_steps": 2, "global_batch_size": 4 * ranks, "micro_batch_size": 2},
            "sharding": {
                "engine": "deepspeed",
                "zero_stage": stage,
                "offload_optimizer": "o" in offload,
                "offload_parameters": "p" in offload,
            },
            "retention": {"policy": policy},
            "hardware": {"gpus_per_node": ranks},
        }
    )


def advanced(level: int, changes: list[int]) -> tuple[int, int]:
    peak = level
    for change in changes:
        level += change
        peak = max(peak, level)
    return peak, level


def recorded(recording: Recording) -> Levels:
    """Of the two micro-batches, and of the step."""
    found: Levels = []
    level = 0
    for part in recording.parts:
        # What comes before the first mark of a part belongs to the last one of the part before.
        for mark, changes in zip((None, *part.marks), part.engine, strict=True):
            peak, level = advanced(level, changes)
            if mark is None and found and part.name != "optimizer step":
                found[-1] = (found[-1][0], max(found[-1][1], peak), level)
            elif mark is not None or part.name == "optimizer step":
                found.append((mark or Mark("step", "", None), peak, level))
    return joined(found)


def modelled(recording: Recording, holder: Holder, weights: Weights) -> Levels:
    """The same as a holder says it."""
    found: Levels = []
    level = 0
    for part in recording.parts:
        if part.name == "inputs":
            level += sum(holder.begin())
        for mark in part.marks:
            peak, level = advanced(level, [*told(holder, weights, mark, 0)])
            found.append((mark, peak, level))
    peak, level = advanced(level, [*holder.step()])
    return joined([*found, (Mark("step", "", None), peak, level)])


def joined(levels: Levels) -> Levels:
    """DeepSpeed reduces what is left while the last gradient is told, the model at the end of the pass."""
    found: Levels = []
    for mark, peak, level in levels:
        if mark.kind == END_OF_PASS:
            peak = max(peak, found.pop()[1])
        found.append((mark, peak, level))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "policy", "one_by_one", "offload"),
    [
        (1, "fp32", 4, "all", True, ""),
        (1, "fp32_master", 2, "all", True, ""),
        (1, "fp32_master", 3, "checkpoint", True, "o"),
        (2, "fp32_master", 3, "checkpoint", True, ""),
        (2, "fp32_master", 2, "all", True, "o"),
        (2, "fp32", 4, "all", True, "o"),
        (3, "fp32", 4, "checkpoint", True, ""),
        (3, "fp32_master", 2, "all", False, ""),
        (3, "pure_bf16", 3, "checkpoint", False, ""),
        (3, "fp32_master", 2, "checkpoint", True, "o"),
        (3, "fp32_master", 4, "all", False, "op"),
        (3, "fp32", 3, "all", True, "p"),
    ],
)
def test_what_deepspeed_allocates_at_every_mark(monkeypatch, stage, precision, ranks, policy, one_by_one, offload):
    if one_by_one:
        # As over gloo; else neighbours are gathered together, and ahead.
        monkeypatch.setattr(engine_module.dist, "get_backend", lambda group=None: "gloo")
    config = config_of(stage, precision, ranks, policy, offload)
    with first_of(ranks) as connected:
        recording = record_step(config, probe_batch(BATCH, packed=False), connected)
    model = configured_empty_model(config, None)
    weights = weights_of(model, parameter_groups(model, config.optimizer))
    sizes = bucket_sizes(model_sizes(describe(model, task="causal_lm")))
    holders = Holders(config, weights, sizes, one_by_one=one_by_one)
    marks = [mark for part in recording.parts[: len(recording.parts) // 2] for mark in part.marks]
    entered = [(mark.name, mark.offset) for mark in marks if mark.kind == FETCH]
    holder = holders.of(Choice.of(config, ranks, 1.0), entered, rank=0)
    assert sum(holder.held().values()) == pytest.approx(recording.start, abs=SCALARS)
    assert holder.on_host() == pytest.approx(recording.host, abs=SCALARS)
    expected, found = recorded(recording), modelled(recording, holder, weights)
    assert len(expected) > 50
    assert [mark for mark, *_ in found] == [mark for mark, *_ in expected]
    for (mark, *levels), (_, *others) in zip(expected[:-1], found[:-1], strict=True):
        assert others == pytest.approx(levels, abs=SCALARS), str(mark)
    # The weights that are gathered anew after an update are others than those that were there before.
    anew = sum(weight.elements for weight in weights.all if weight.elements <= 10 * 192) * 4
    assert found[-1][1:] == pytest.approx(expected[-1][1:], abs=SCALARS + anew)


def test_stages_1_and_2_by_hand():
    first, second = Weight("a", None, 60, 4, 0, 6), Weight("b", None, 40, 4, 0, 4)
    weights = Weights((first, second), buffers=12)
    holder = FlatPartitions(
        weights,
        Bytes(2, 4, 4),
        lambda elements, size: 8 * elements,
        lambda elements: elements,
        Buckets(reduce=80),
        stage=2,
        ranks=2,
    )
    # 50 elements each: the first rank has 50 of `a`, the second 10 of it and all of `b`, which is more.
    assert holder.held() == {"weights": 212, "master weights": 200, "optimizer state": 400}
    assert [*holder.gradient(second)] == [80, 160, 0, -80]
    # The bucket is full: one rank's gradient in one piece needs no copy, and its partition gets a place.
    assert [*holder.gradient(first)] == [120, 0, 0, 200, -120]
    # What is left is in pieces of both ranks, and is copied; the sums are in float32.
    assert [*holder.end_of_pass()] == [120, -120, -160, 200, -200]
    assert [*holder.step()] == [200, -200, 50, -50, -200]


def test_whole_gradients_by_hand():
    first, second = Weight("a", None, 60, 2, 0, 6), Weight("b", None, 40, 4, 0, 4)
    holder = WholeGradients(
        Weights((first, second), buffers=0),
        lambda elements, size: 8 * elements,
        lambda elements: 3 * elements,
        bucket=50,
    )
    assert holder.held() == {"weights": 280, "optimizer state": 800}
    assert [*holder.gradient(first), *holder.gradient(second), *holder.gradient(first)] == [120, 160]
    assert [*holder.step()] == [120, -120, 160, -160, 180, -180, 120, -120, -280]
