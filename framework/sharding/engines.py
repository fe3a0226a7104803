"""The engine that a config asks for, and its concrete options."""

from __future__ import annotations

from typing import Any

from framework.config import Config
from framework.models import Architecture
from framework.sharding.deepspeed_config import ModelSizes, OwnOptions, deepspeed_options
from framework.sharding.protocol import Engine
from framework.sharding.ranks import Ranks
from framework.sharding.single import SingleEngine


def model_sizes(architecture: Architecture) -> ModelSizes:
    """What DeepSpeed's buffers are sized by."""
    found = architecture
    return ModelSizes(found.parameters, found.blocks, found.hidden_size, found.vocab_size)


def engine_options(config: Config, sizes: ModelSizes, ranks: int, own: OwnOptions | None) -> dict[str, Any]:
    """What the engine is told, as JSON values with nothing left open.

    Args:
        config: of the run.
        sizes: of the model.
        ranks: number of processes.
        own: a user's own options of DeepSpeed, from `read_own_options`.

    Raises:
        UserError: the user's options contradict the config.
    """
    sharding = config.sharding
    if sharding.engine == "deepspeed":
        if own is None:
            return deepspeed_options(config, sizes, ranks)
        return deepspeed_options(config, sizes, ranks, own.values, source=own.source)
    options: dict[str, Any] = {"precision": config.optimizer.precision}
    if sharding.engine == "fsdp":
        options |= {
            "reshard_after_forward": sharding.reshard_after_forward,
            "replicas": sharding.replicas,
            "shard_ranks": ranks // sharding.replicas,
            "offload": sharding.offload_parameters,
        }
    return options


def make_engine(config: Config, ranks: Ranks, options: dict[str, Any]) -> Engine:
    """The engine of a run, which holds no model yet.

    Args:
        config: of the run.
        ranks: that take part, connected.
        options: from `engine_options`.

    Raises:
        UserError: the engine's library is not installed, or cannot do what is asked for.
    """
    precision, loss_scale, sharding = config.optimizer.precision, config.optimizer.loss_scale, config.sharding
    if sharding.engine == "single":
        return SingleEngine(precision, loss_scale=loss_scale)
    if sharding.engine == "fsdp":
        from framework.sharding.fsdp import FsdpEngine

        return FsdpEngine(
            precision,
            ranks,
            reshard_after_forward=sharding.reshard_after_forward,
            replicas=sharding.replicas,
            offload=sharding.offload_parameters,
            loss_scale=loss_scale,
        )
    from framework.sharding.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(precision, ranks, options)
