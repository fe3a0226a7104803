"""DeepSpeed's JSON for a run: every number written out, and a user's own JSON merged. Must not import torch.

Without Hugging Face's Trainer, DeepSpeed replaces what says "auto" by its defaults and ignores top-level keys that it
does not know, both silently. Here nothing is left to it: a key is the run's, passed on, or an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.config import Config, LossScaleConfig
from framework.errors import UserError
from framework.sharding.deepspeed_keys import SIZE_KEYS
from framework.sharding.deepspeed_merging import AUTO, is_count, merge

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


@dataclass(frozen=True)
class OwnOptions:
    """A user's own DeepSpeed JSON: its values, and where it is from."""

    values: dict[str, Any]
    source: str

    @property
    def zero(self) -> dict[str, Any]:
        """Its `zero_optimization`, without what it leaves to others."""
        given = self.values.get("zero_optimization")
        return {key: value for key, value in given.items() if value != AUTO} if isinstance(given, dict) else {}

    @property
    def buffers(self) -> dict[str, Any]:
        """What it says of the buffers of exchanges, as far as that is valid."""
        sizes = {key: int(value) for key, value in self.zero.items() if key in SIZE_KEYS and is_count(value)}
        overlap = self.zero.get("overlap_comm")
        return sizes | ({"overlap_comm": overlap} if isinstance(overlap, bool) else {})

    def permits(self, stage: int, *, offload_optimizer: bool, offload_parameters: bool) -> bool:
        """Whether it does not contradict a ZeRO stage and what is on the host."""
        if self.zero.get("stage", stage) != stage:
            return False
        for key, offloads in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
            section = self.zero.get(key)
            device = section.get("device", AUTO) if isinstance(section, dict) else AUTO
            if device not in (AUTO, "cpu" if offloads else "none"):
                return False
        return True


def read_own_options(path: Path) -> OwnOptions:
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
    return OwnOptions(own, str(path))


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
    problems = [*merge(options, own, config)]
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
