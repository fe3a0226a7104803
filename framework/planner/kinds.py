"""Which choices have the same law. Must not import torch."""

from __future__ import annotations

from dataclasses import replace

from framework.config import Config
from framework.planner.choice import Choice
from framework.planner.overrides import with_overrides


def kind_of(choice: Choice) -> Choice:
    """What a law depends on of a choice, the rest at fixed values."""
    # A selection of everything goes the same way as one of a part, but the other policies know none of a part.
    ratio = 0.5 if choice.strategy != "none" and choice.policy == "selective" else 1.0
    engine, stage, offload = choice.engine, choice.zero_stage, choice.offload_parameters
    if engine == "deepspeed":
        # What the engine allocates, and where, is in no law of it.
        offload = False
        # Passes of stage 0 are those of one process, and those of stage 1 are those of stage 2.
        engine, stage = {0: ("single", None), 1: (engine, 2)}.get(stage or 0, (engine, stage))
    # Which linear layers are retained, one law says for all choices that retain any: it has all of them retained. With
    # none, the output of attention is not retained either.
    linears = choice.policy == "selective" and bool(choice.retain_linears)
    # Copies exchange gradients beside; how many there are is no matter. How many ranks share one is a size in the law,
    # but that FSDP2 gathers nothing where a rank has a copy to itself.
    replicas = min(choice.replicas, 2)
    ranks = replicas * min(choice.shard_ranks, 2) if engine == "fsdp" else 1
    return replace(
        choice,
        retain_linears=linears,
        engine=engine,
        zero_stage=stage,
        offload_optimizer=offload,
        offload_parameters=offload,
        ratio=ratio,
        micro_batch_size=1,
        accumulation=1,
        ranks=ranks,
        replicas=replicas,
    )


def config_of_law(config: Config, kind: Choice) -> Config:
    """A run that has a kind's law."""
    ratio: float | None = None if kind.strategy == "none" else kind.ratio
    values = {
        "selection.strategy": kind.strategy,
        "selection.ratio": ratio,
        "retention.policy": kind.policy,
        "retention.retain_linears": kind.retain_linears,
        "retention.kv_format": kind.kv_format,
        "retention.placement": kind.placement,
        "sharding.engine": kind.engine,
        "sharding.zero_stage": kind.zero_stage,
        "sharding.reshard_after_forward": kind.reshard_after_forward,
        "sharding.replicas": kind.replicas,
        "sharding.offload_optimizer": kind.offload_optimizer,
        "sharding.offload_parameters": kind.offload_parameters,
        "training.micro_batch_size": 1,
        "training.global_batch_size": kind.ranks,
        "hardware.nodes": 1,
        "hardware.gpus_per_node": kind.ranks,
        "cluster.min_nodes": None,
    }
    found = with_overrides(config, values)
    assert found is not None
    return found
