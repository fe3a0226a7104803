"""DeepSpeed's JSON for a run: every number written out, and a user's own JSON merged. Must not import torch.

Without Hugging Face's Trainer, DeepSpeed replaces what says "auto" by its defaults and ignores top-level keys that it
does not know, both silently. Here nothing is left to it: a key is the run's, passed on, or an error.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.config import Config, LossScaleConfig
from framework.errors import UserError
from framework.sharding.deepspeed_keys import (
    OFFLOAD_KEYS,
    PASSED_KEYS,
    PASSED_ZERO_KEYS,
    REFUSED_KEYS,
    REFUSED_OFFLOAD_KEYS,
    REFUSED_ZERO_KEYS,
    RUN_KEYS,
    SIZE_KEYS,
)

AUTO = "auto"

MIN_BUCKET = 1 << 19
"""Elements below which an exchange costs its latency, not its bytes."""

MAX_BUCKET = 1 << 26
"""Elements of the largest bucket: 128 MiB in 16 bits, of which `overlap_comm` holds two."""

MAX_LIVE = 1_000_000_000
SUB_GROUP = 100_000_000
NEVER = 1 << 31


@dataclass(frozen=True)
class ModelSizes:
    """What buckets are sized by; `read_architecture` knows all of it.

    Attributes:
        parameters: elements of all parameters, tied ones once.
        blocks: number of transformer layers.
        hidden_size: width of the rows between them.
        vocab_size: rows of the token embedding; None without one.
    """

    parameters: int
    blocks: int
    hidden_size: int
    vocab_size: int | None = None

    @property
    def embedding_parameters(self) -> int:
        """Of one embedding or head."""
        return self.hidden_size * (self.vocab_size or 0)

    @property
    def block_parameters(self) -> int:
        """Of one block; where embedding and head are not tied, the head's share is counted with the blocks."""
        return max(1, (self.parameters - self.embedding_parameters) // max(1, self.blocks))


def bucket_sizes(sizes: ModelSizes) -> dict[str, int]:
    """The sizes of DeepSpeed's buffers, in elements, by their names in `zero_optimization`.

    A bucket holds one block: its gradients are exchanged while the block before it runs backward, and its weights are
    fetched while the block before it runs forward. `reduce_bucket_size` is allocated as a buffer in the dtype of the
    gradients during every backward pass, twice with `overlap_comm`.

    * `reduce_bucket_size`, `allgather_bucket_size`: a block, within `MIN_BUCKET` and `MAX_BUCKET`, at most the model,
      rounded up to an even number;
    * `stage3_prefetch_bucket_size`: a block, at most `MAX_BUCKET`;
    * `stage3_param_persistence_threshold`: 10 rows of the hidden state, so that norms and biases stay whole;
    * `stage3_max_live_parameters`: two blocks, an embedding and a head, at most `MAX_LIVE`;
    * `stage3_max_reuse_distance`: a block, at most `MAX_LIVE`: what another block separates is fetched again;
    * `sub_group_size`: `SUB_GROUP`, which bounds the gradients that stage 3 copies at a time in its update.
    """
    block = sizes.block_parameters
    bucket = min(max(block, MIN_BUCKET), MAX_BUCKET, sizes.parameters)
    bucket += bucket % 2
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(block, MAX_BUCKET),
        "stage3_param_persistence_threshold": 10 * sizes.hidden_size,
        "stage3_max_live_parameters": min(2 * (block + sizes.embedding_parameters), MAX_LIVE),
        "stage3_max_reuse_distance": min(block, MAX_LIVE),
        "sub_group_size": SUB_GROUP,
    }


def read_own_options(path: Path) -> dict[str, Any]:
    """A user's own DeepSpeed JSON.

    Raises:
        UserError: the file cannot be read or is not a JSON object; with the line.
    """
    try:
        own = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a DeepSpeed config: {error}") from None
    if not isinstance(own, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object")
    return own


def deepspeed_options(
    config: Config,
    sizes: ModelSizes,
    ranks: int,
    own: dict[str, Any] | None = None,
    *,
    source: str = "the DeepSpeed config",
) -> dict[str, Any]:
    """The JSON that `deepspeed.initialize` gets: no "auto" in it, and no optimiser or schedule, which are the run's.

    Args:
        config: of the run; `sharding.engine` is "deepspeed".
        sizes: of the model.
        ranks: number of processes.
        own: a user's own options. Those that the run leaves open win over the ones computed here.
        source: of `own`, for messages.

    Raises:
        UserError: keys of `own` that contradict the run, change what it computes, or are unknown; all are listed.
    """
    options = _run_options(config, sizes, ranks)
    if own is None:
        return options
    problems = [*_merge(options, own, config)]
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise UserError("\n  ".join([f"{source}: {count}", *problems]))
    return options


def _run_options(config: Config, sizes: ModelSizes, ranks: int) -> dict[str, Any]:
    stage, precision = config.zero_stage, config.optimizer.precision
    sharding = config.sharding
    zero: dict[str, Any] = {
        "stage": stage,
        # Stage 1 reduces once a step, after the last backward pass; in stages 2 and 3 it hides behind the passes.
        "overlap_comm": stage >= 2,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        **bucket_sizes(sizes),
    }
    if sharding.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if sharding.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    options = {
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation(ranks),
        "gradient_clipping": config.training.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "bf16": _bf16(precision, stage),
        "fp16": _fp16(config, stage),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        # It waits for the device twice a step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if stage == 3 and precision != "fp32":
        options["data_types"] = {"grad_accum_dtype": "bf16" if precision == "pure_bf16" else "fp32"}
    return options


def _bf16(precision: str, stage: int) -> dict[str, Any]:
    """In stage 0 the weights are what the model has, and passes run under the engine's autocast."""
    pure = precision == "pure_bf16"
    if stage == 0 or not (pure or precision == "fp32_master"):
        return {"enabled": False}
    return {
        "enabled": True,
        # The engine looks at the gradients itself.
        "check_grad_overflow": False,
        "bf16_master_weights_and_grads": pure,
        "bf16_optimizer_states": pure,
    }


def _fp16(config: Config, stage: int) -> dict[str, Any]:
    if config.optimizer.precision != "fp16":
        return {"enabled": False}
    given = config.optimizer.loss_scale
    scale = given if isinstance(given, LossScaleConfig) else LossScaleConfig()
    return {
        "enabled": stage > 0,
        "loss_scale": given if isinstance(given, float) else 0.0,
        "initial_scale_power": round(math.log2(scale.initial)),
        "loss_scale_window": scale.growth_interval,
        "hysteresis": 1,
        "min_loss_scale": int(scale.minimum),
    }


def _merge(options: dict[str, Any], own: dict[str, Any], config: Config) -> Iterator[str]:
    """Take over what the run leaves open; the problems of the rest."""
    known = [*options, *PASSED_KEYS, *REFUSED_KEYS, "optimizer", "scheduler", "data_types"]
    for key, value in own.items():
        if value == AUTO:
            continue
        if key in REFUSED_KEYS:
            if _is_on(value):
                yield f"{key}: {REFUSED_KEYS[key]}: leave it out"
        elif key == "zero_optimization":
            yield from _merge_zero(options[key], value)
        elif key in ("bf16", "fp16", "data_types"):
            yield from _compare_section(key, value, options.get(key, {}))
        elif key == "optimizer":
            yield from _compare_optimizer(value, config)
        elif key == "scheduler":
            yield from _compare_scheduler(value)
        elif key in RUN_KEYS:
            yield from _compare(key, value, options[key])
        elif key in PASSED_KEYS:
            options[key] = value
        else:
            yield _unknown(key, known)


def _merge_zero(zero: dict[str, Any], own: Any) -> Iterator[str]:
    if not isinstance(own, dict):
        yield f"zero_optimization: an object is needed, not {json.dumps(own)}"
        return
    known = [*zero, *PASSED_ZERO_KEYS, *REFUSED_ZERO_KEYS, *OFFLOAD_KEYS]
    for key, value in own.items():
        name = f"zero_optimization.{key}"
        if value == AUTO:
            continue
        if key == "stage":
            yield from _compare(name, value, zero["stage"])
        elif key in OFFLOAD_KEYS:
            yield from _merge_offload(name, value, zero.get(key))
        elif key in REFUSED_ZERO_KEYS:
            neutral, reason = REFUSED_ZERO_KEYS[key]
            if value not in (neutral, None):
                yield f"{name}: {reason}: leave it out"
        elif key in SIZE_KEYS:
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
                yield f"{name}: {json.dumps(value)} is not a number of elements"
            else:
                zero[key] = int(value)
        elif key in PASSED_ZERO_KEYS:
            zero[key] = value
        else:
            yield _unknown(name, [f"zero_optimization.{other}" for other in known])


def _merge_offload(name: str, own: Any, offload: dict[str, Any] | None) -> Iterator[str]:
    own = {} if own is None else own
    if not isinstance(own, dict):
        yield f"{name}: an object is needed, not {json.dumps(own)}"
        return
    run_key = RUN_KEYS[name]
    if own.get("device", AUTO) != AUTO:
        yield from _compare(f"{name}.device", own["device"], "none" if offload is None else offload["device"], run_key)
    for key, value in own.items():
        if key == "device" or value == AUTO:
            continue
        if key in REFUSED_OFFLOAD_KEYS:
            neutral, reason = REFUSED_OFFLOAD_KEYS[key]
            if value not in (neutral, None):
                yield f"{name}.{key}: {reason}: leave it out"
        elif key == "pin_memory":
            if offload is not None:
                offload[key] = value
        else:
            yield _unknown(f"{name}.{key}", [f"{name}.{other}" for other in ("device", "pin_memory")])


def _compare_section(name: str, own: Any, mine: dict[str, Any]) -> Iterator[str]:
    """A section that the run decides; what a disabled one says besides has no effect."""
    if not isinstance(own, dict):
        yield f"{name}: an object is needed, not {json.dumps(own)}"
        return
    if name != "data_types" and own.get("enabled", AUTO) != AUTO:
        yield from _compare(f"{name}.enabled", own["enabled"], mine["enabled"])
    if not mine.get("enabled", True):
        return
    for key, value in own.items():
        if key == "enabled" or value == AUTO:
            continue
        if key in mine:
            yield from _compare(f"{name}.{key}", value, mine[key], RUN_KEYS[name])
        elif value not in (False, None):
            yield f"{name}.{key}: {json.dumps(value)} is not what {RUN_KEYS[name]} means here: leave it out"


def _compare_optimizer(own: Any, config: Config) -> Iterator[str]:
    if not isinstance(own, dict):
        yield f"optimizer: an object is needed, not {json.dumps(own)}"
        return
    settings = config.optimizer
    if str(own.get("type", AUTO)).lower() not in (AUTO, "adamw"):
        yield from _compare("optimizer.type", own["type"], "AdamW")
    mine = {
        "lr": ("optimizer.learning_rate", settings.learning_rate),
        "betas": ("optimizer.betas", [*settings.betas]),
        "eps": ("optimizer.epsilon", settings.epsilon),
        "weight_decay": ("optimizer.weight_decay", settings.weight_decay),
    }
    for key, value in own.get("params", {}).items():
        if value == AUTO or (key in ("adam_w_mode", "torch_adam") and value is True):
            continue
        if key in mine:
            run_key, run_value = mine[key]
            yield from _compare(f"optimizer.params.{key}", value, run_value, run_key)
        else:
            yield f"optimizer.params.{key}: the run's config has no such option: leave it out"
    for key in own:
        if key not in ("type", "params"):
            yield _unknown(f"optimizer.{key}", ["optimizer.type", "optimizer.params"])


def _compare_scheduler(own: Any) -> Iterator[str]:
    params = own.get("params", {}) if isinstance(own, dict) else {"": own}
    if any(value != AUTO for value in params.values()):
        yield "scheduler: the run's `schedule` section sets the learning rate of every step: leave it out"


def _compare(name: str, own: Any, mine: Any, run_key: str | None = None) -> Iterator[str]:
    if own != mine or isinstance(own, bool) != isinstance(mine, bool):
        yield (
            f"{name} is {json.dumps(own)}, but {run_key or RUN_KEYS[name]} makes it {json.dumps(mine)}: "
            'leave it out or set it to "auto", or change the run\'s config'
        )


def _is_on(value: Any) -> bool:
    """Whether a section or a switch asks for something."""
    if isinstance(value, dict):
        return bool(value.get("enabled", bool(value)))
    return value not in (False, None, 0)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{name}: unknown to DeepSpeed" + (f'; nearest: "{near[0]}"' if near else "")
