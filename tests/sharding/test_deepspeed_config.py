"""DeepSpeed's JSON of a run, and what a user's own may say."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from framework.config import Config
from framework.errors import UserError
from framework.sharding.deepspeed_config import (
    MAX_BUCKET,
    MAX_LIVE,
    MIN_BUCKET,
    ModelSizes,
    OwnOptions,
    bucket_sizes,
    deepspeed_options,
    read_own_options,
)

LLAMA_8B = ModelSizes(parameters=8_030_261_248, blocks=32, hidden_size=4096, vocab_size=128_256)
SMALL = ModelSizes(parameters=9_999_999, blocks=4, hidden_size=128, vocab_size=1000)
TINY = ModelSizes(parameters=12_345, blocks=2, hidden_size=16, vocab_size=64)


def config(**sections: dict[str, Any]) -> Config:
    settings = {
        "run": {"output_dir": "runs/x"},
        "model": {"from_config": {"model_type": "llama"}},
        "data": {"train": "train.jsonl", "sequence_length": 64},
        "training": {"max_steps": 1, "global_batch_size": 48, "micro_batch_size": 4},
        "sharding": {"engine": "deepspeed"},
        "optimizer": {"learning_rate": 1e-4},
    }
    names = {**settings, **sections}
    tree = {name: {**settings.get(name, {}), **sections.get(name, {})} for name in names}
    return Config.model_validate_json(json.dumps(tree))


def merged(own: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return deepspeed_options(config(**sections), SMALL, 3, own, source="ds.json")


def problems(own: dict[str, Any], **sections: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        merged(own, **sections)
    first, *lines = str(caught.value).split("\n  ")
    assert first == f"ds.json: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return lines


def values_of(tree: Any) -> list[Any]:
    return [leaf for value in tree.values() for leaf in values_of(value)] if isinstance(tree, dict) else [tree]


def test_everything_is_written_out() -> None:
    options = deepspeed_options(config(), SMALL, 3)
    assert "auto" not in values_of(options)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [options[key] for key in batch] == [48, 4, 4, 1.0]
    assert options["zero_optimization"]["stage"] == 3
    assert "offload_optimizer" not in options["zero_optimization"]
    assert (options["bf16"], options["fp16"]) == ({"enabled": False}, {"enabled": False})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_precisions(stage: int) -> None:
    def options(precision: str, **optimizer: Any) -> dict[str, Any]:
        settings = {"learning_rate": 1e-4, "precision": precision, **optimizer}
        return deepspeed_options(config(sharding={"zero_stage": stage}, optimizer=settings), SMALL, 1)

    master, pure, fp16 = options("fp32_master"), options("pure_bf16"), options("fp16")
    assert [o["bf16"]["enabled"] for o in (master, pure, fp16)] == [stage > 0, stage > 0, False]
    assert fp16["fp16"] == {
        "enabled": stage > 0,
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 2000,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }
    assert options("fp16", loss_scale=128.0)["fp16"]["loss_scale"] == 128.0
    moving = options("fp16", loss_scale={"initial": 4096, "growth_interval": 7, "minimum": 2})["fp16"]
    assert (moving["initial_scale_power"], moving["loss_scale_window"], moving["min_loss_scale"]) == (12, 7, 2)
    if stage > 0:
        assert [o["bf16"]["bf16_master_weights_and_grads"] for o in (master, pure)] == [False, True]
    dtypes = [o.get("data_types", {}).get("grad_accum_dtype") for o in (master, pure, fp16)]
    assert dtypes == (["fp32", "bf16", "fp32"] if stage == 3 else [None] * 3)


def test_no_clipping_and_offload() -> None:
    training = {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 8, "max_grad_norm": None}
    sharding = {"offload_optimizer": True, "offload_parameters": True}
    options = deepspeed_options(config(training=training, sharding=sharding), SMALL, 1)
    assert options["gradient_clipping"] == 0.0
    assert options["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert options["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_buckets_hold_a_block_within_bounds() -> None:
    large, small, tiny = map(bucket_sizes, (LLAMA_8B, SMALL, TINY))
    assert LLAMA_8B.block_parameters == (8_030_261_248 - 4096 * 128_256) // 32
    assert large["reduce_bucket_size"] == large["stage3_prefetch_bucket_size"] == MAX_BUCKET
    assert large["stage3_param_persistence_threshold"] == 40_960
    assert large["stage3_max_live_parameters"] == MAX_LIVE
    assert large["stage3_max_reuse_distance"] == LLAMA_8B.block_parameters
    assert SMALL.block_parameters == (9_999_999 - 128_000) // 4 == 2_467_999 > MIN_BUCKET
    assert small["reduce_bucket_size"] == small["allgather_bucket_size"] == 2_468_000
    assert small["stage3_prefetch_bucket_size"] == 2_467_999
    assert small["stage3_max_live_parameters"] == 2 * (2_467_999 + 128_000)
    assert tiny["reduce_bucket_size"] == 12_346
    assert all(isinstance(size, int) for size in (*large.values(), *small.values(), *tiny.values()))


def test_a_users_own_options_win_where_the_run_leaves_them_open() -> None:
    own = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "comms_logger": {"enabled": True},
        "prescale_gradients": False,
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5e8,
            "stage3_prefetch_bucket_size": "auto",
            "overlap_comm": False,
            "zero_quantized_weights": False,
            "offload_optimizer": {"device": "none"},
        },
    }
    options = merged(own)
    expected = deepspeed_options(config(), SMALL, 3)
    expected["zero_optimization"] |= {"reduce_bucket_size": 500_000_000, "overlap_comm": False}
    assert options == expected | {"comms_logger": {"enabled": True}, "wall_clock_breakdown": True}
    assert isinstance(options["zero_optimization"]["reduce_bucket_size"], int)


def test_all_contradictions_are_listed_together() -> None:
    own = {
        "train_batch_size": 47,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Lion", "params": {"lr": 1e-3, "momentum": 0.9}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_optimization": {"stage": 2, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}},
    }
    advice = 'leave it out or set it to "auto", or change the run\'s config'
    assert problems(own) == [
        f"train_batch_size is 47, but training.global_batch_size makes it 48: {advice}",
        "gradient_accumulation_steps is 1, but training.global_batch_size / (training.micro_batch_size x ranks) "
        f"makes it 4: {advice}",
        f"gradient_clipping is 0.5, but training.max_grad_norm makes it 1.0: {advice}",
        f"bf16.enabled is true, but optimizer.precision makes it false: {advice}",
        f'optimizer.type is "Lion", but optimizer.name makes it "AdamW": {advice}',
        f"optimizer.params.lr is 0.001, but optimizer.learning_rate makes it 0.0001: {advice}",
        "optimizer.params.momentum: the run's config has no such option: leave it out",
        "scheduler: the run's `schedule` section sets the learning rate of every step: leave it out",
        f"zero_optimization.stage is 2, but sharding.zero_stage makes it 3: {advice}",
        'zero_optimization.offload_param.device is "nvme", but sharding.offload_parameters makes it "none": ' + advice,
        "zero_optimization.offload_param.nvme_path: offloading to a disk is not supported: leave it out",
    ]


def test_what_deepspeed_would_ignore_or_crash_on_is_named_with_what_is_near() -> None:
    assert problems({"zero_optimisation": {}, "xyz": 1, "zero_optimization": {"overlap_com": True}}) == [
        'zero_optimisation: unknown to DeepSpeed; nearest: "zero_optimization"',
        "xyz: unknown to DeepSpeed",
        'zero_optimization.overlap_com: unknown to DeepSpeed; nearest: "zero_optimization.overlap_comm"',
    ]


def test_values_of_another_kind_are_named() -> None:
    own = {
        "optimizer": {"type": "AdamW", "params": [1e-4]},
        "scheduler": {"type": "WarmupLR", "params": [10]},
        "zero_optimization": {"reduce_bucket_size": float("inf"), "sub_group_size": 1.5},
    }
    assert problems(own) == [
        "optimizer.params: an object is needed, not [0.0001]",
        "scheduler: the run's `schedule` section sets the learning rate of every step: leave it out",
        "zero_optimization.reduce_bucket_size: Infinity is not a number of elements",
        "zero_optimization.sub_group_size: 1.5 is not a number of elements",
    ]
    for empty in (None, "auto", {}):
        assert merged({name: {"params": empty} for name in ("optimizer", "scheduler")}) == merged({})


def test_what_changes_the_result_is_refused_with_the_reason() -> None:
    own = {
        "prescale_gradients": True,
        "curriculum_learning": {"enabled": True},
        "zero_optimization": {"zero_quantized_gradients": True, "reduce_bucket_size": -1, "sub_group_size": "1e9"},
    }
    assert problems(own) == [
        "prescale_gradients: gradients are summed over micro-batches and ranks in one way, so that any split gives the "
        "same loss: leave it out",
        "curriculum_learning: the run's `data` section says what comes in which order: leave it out",
        "zero_optimization.zero_quantized_gradients: it rounds weights or gradients to fewer bits than "
        "optimizer.precision says: leave it out",
        "zero_optimization.reduce_bucket_size: -1 is not a number of elements",
        'zero_optimization.sub_group_size: "1e9" is not a number of elements',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,\n "b": }', "line 2, column 7: not JSON: Expecting value"),
        ("[]", "a DeepSpeed config is a JSON object"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_own_options(path)
    assert str(caught.value) == f"{path}: {expected}"
    with pytest.raises(UserError, match=r"none\.json: cannot be read as a DeepSpeed config"):
        read_own_options(tmp_path / "none.json")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": "auto"}')
    assert read_own_options(path) == OwnOptions({"train_batch_size": "auto"}, str(path))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"optimizer": {"precision": "pure_bf16"}, "sharding": {"offload_optimizer": True}},
            "sharding.offload_optimizer: DeepSpeed does not offload bf16 weights without a master",
        ),
        (
            {"optimizer": {"precision": "fp16", "loss_scale": {"initial": 1000}}},
            "optimizer.loss_scale: DeepSpeed starts with a power of two, and initial is 1000.0",
        ),
        (
            {"optimizer": {"precision": "fp16", "loss_scale": {"minimum": 0.5}}},
            "optimizer.loss_scale: DeepSpeed's minimum is a whole number of at least 1, not 0.5",
        ),
    ],
)
def test_what_deepspeed_cannot_do_is_a_problem_of_the_config(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        config(**sections)


def test_torch_is_not_imported() -> None:
    program = "import sys, framework.sharding.deepspeed_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_deepspeed_knows_the_keys() -> None:
    """Against its source, because importing it changes torch for the rest of this process."""
    from framework.sharding.deepspeed_keys import PASSED_ZERO_KEYS, REFUSED_ZERO_KEYS

    spec = find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "runtime" / "zero" / "config.py").read_text()
    assert [key for key in (*PASSED_ZERO_KEYS, *REFUSED_ZERO_KEYS) if key not in text] == []


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, {(1, False), (3, False), (3, True)}),
        ({"stage": "auto"}, {(1, False), (3, False), (3, True)}),
        ({"stage": 3}, {(3, False), (3, True)}),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, {(3, True)}),
        ({"offload_param": {"device": "none"}}, {(1, False), (3, False)}),
        ({"offload_param": {"device": "auto"}}, {(1, False), (3, False), (3, True)}),
    ],
)
def test_what_a_users_own_options_permit(zero: dict[str, Any], expected: set[tuple[int, bool]]) -> None:
    own = OwnOptions({"zero_optimization": zero}, "ds.json")
    choices = [(1, False), (3, False), (3, True)]
    assert {
        (stage, offload)
        for stage, offload in choices
        if own.permits(stage, offload_optimizer=offload, offload_parameters=offload)
    } == expected


def test_what_a_users_own_options_say_of_buffers() -> None:
    zero = {"reduce_bucket_size": 5e8, "sub_group_size": "auto", "stage3_max_live_parameters": "x", "stage": 2}
    assert OwnOptions({"zero_optimization": zero}, "ds.json").buffers == {"reduce_bucket_size": 500_000_000}
    assert OwnOptions({"zero_optimization": {"overlap_comm": False}}, "").buffers == {"overlap_comm": False}
    assert OwnOptions({"zero_optimization": 7}, "").buffers == OwnOptions({}, "").buffers == {}
