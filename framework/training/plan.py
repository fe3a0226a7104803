"""The settings of a run in the shape of a plan, and as text. Must not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from framework.sharding.precision import PRECISIONS

if TYPE_CHECKING:
    from framework.config import Config


def settings_plan(config: Config, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """`plan.json` of a run whose settings were all given: nothing is predicted, so every prediction is null.

    Args:
        config: of the run.
        ranks: number of processes.
        options: the engine's, from `engine_options`.
    """
    chosen: dict[str, Any] = {
        "engine": config.sharding.engine,
        "zero_stage": config.zero_stage,
        "engine_options": options,
        "selection": {"strategy": config.selection.strategy, "ratio": config.resolved_ratio},
        "fidelity_class": fidelity_class(config),
        "warnings": [],
        "retention": {
            "policy": config.retention.policy,
            "retain_linears": config.retention.retain_linears,
            "kv_format": config.retention.kv_format,
            "placement": config.retention.placement,
        },
        "micro_batch_size": config.training.micro_batch_size,
        "gradient_accumulation": config.gradient_accumulation(ranks),
        "offload_optimizer": config.sharding.offload_optimizer,
        "peak_allocated_bytes": None,
        "peak_reserved_bytes": None,
        "host_bytes": None,
        "binding_phase": None,
        "step_seconds": None,
        "tokens_per_second": None,
        "ledger": [],
    }
    return {"fits": None, "budget_bytes": None, "chosen": chosen, "plans": [chosen]}


def fidelity_class(config: Config) -> str:
    """`exact`, `context detached` (every labelled token is selected) or `tokens dropped` (some are not)."""
    if config.selection.strategy == "none" or config.resolved_ratio == 1.0:
        return "exact"
    return "context detached" if config.selection.strategy == "supervised" else "tokens dropped"


def state_bytes(
    config: Config,
    parameters: int,
    trainable: int,
    ranks: int = 1,
    *,
    quantized: int = 0,
    quantized_bytes: int = 0,
    optimizer_bytes: int | None = None,
) -> dict[str, int]:
    """Bytes that a rank holds between steps and at the end of a backward pass, activations aside, by kind.

    As `tools/measure_sharding.py` finds them. Left out is what DeepSpeed's stage 3 keeps whole on every rank, which are
    norms and biases.

    Args:
        config: of the run.
        parameters: number of all parameters, tied ones once.
        trainable: number of those that are trained; all are taken to have the precision's own dtype.
        ranks: number of processes.
        quantized: number of those that are quantised.
        quantized_bytes: what holds these.
        optimizer_bytes: of an optimiser whose state has a dtype of its own; None for the precision's.
    """
    width, stage = PRECISIONS[config.optimizer.precision], config.zero_stage
    fsdp, zero = config.sharding.engine == "fsdp", config.sharding.engine == "deepspeed" and stage > 0
    shards = ranks // config.sharding.replicas
    # From stage 1 on DeepSpeed computes with a 16-bit copy, but in fp32; what the optimiser updates is apart from it.
    in_16_bits = zero and config.optimizer.precision != "fp32"
    whole = (parameters - quantized) * (2 if in_16_bits else width.weight_bytes) + quantized_bytes
    gradients = trainable * width.weight_bytes
    optimizer = trainable * width.state_bytes if optimizer_bytes is None else optimizer_bytes
    held = {
        "weights": whole // shards if config.shards_weights else whole,
        "master weights": trainable * width.weight_bytes // shards if zero else 0,
        "gradients": gradients // shards if fsdp or stage >= 2 or in_16_bits else gradients,
        "optimizer state": optimizer // shards if fsdp or zero else optimizer,
    }
    return {kind: size for kind, size in held.items() if size or kind != "master weights"}
