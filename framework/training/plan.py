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
    chosen = {
        "engine": config.sharding.engine,
        "zero_stage": config.zero_stage,
        "engine_options": options,
        "selection": {"strategy": config.selection.strategy, "ratio": config.resolved_ratio},
        "fidelity_class": fidelity_class(config),
        "retention": {
            "policy": config.retention.policy,
            "retain_linears": config.retention.retain_linears,
            "kv_format": config.retention.kv_format,
            "placement": "device",
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
    precision: str,
    parameters: int,
    trainable: int,
    *,
    quantized: int = 0,
    quantized_bytes: int = 0,
    optimizer_bytes: int | None = None,
) -> dict[str, int]:
    """Bytes that a run holds between steps and at the end of a backward pass, activations aside.

    Args:
        precision: `optimizer.precision`.
        parameters: number of all parameters, tied ones once.
        trainable: number of those that are trained; all are taken to have the precision's own dtype.
        quantized: number of those that are quantised.
        quantized_bytes: what holds these.
        optimizer_bytes: of an optimiser whose state has a dtype of its own; None for the precision's.
    """
    width = PRECISIONS[precision]
    return {
        "weights": (parameters - quantized) * width.weight_bytes + quantized_bytes,
        "gradients": trainable * width.weight_bytes,
        "optimizer state": trainable * width.state_bytes if optimizer_bytes is None else optimizer_bytes,
    }
