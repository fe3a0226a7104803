"""Rules about sharding, and about what it changes for other sections."""

from __future__ import annotations

import math
from typing import Any

from framework.config.rules.registry import rule
from framework.config.sections import LossScaleConfig


@rule("sharding.engine", "sharding.zero_stage")
def _stages_are_deepspeeds(engine: str, zero_stage: int | str | None) -> tuple[str, str] | None:
    if engine == "single" and zero_stage:
        shown = f'"{zero_stage}"' if zero_stage == "auto" else zero_stage
        return "sharding.zero_stage", f'{shown} needs sharding.engine "deepspeed", which is "single"'
    if engine == "fsdp" and zero_stage is not None:
        return "sharding.zero_stage", (
            'has no effect with sharding.engine "fsdp", which shards weights, gradients and the optimiser\'s state: '
            "leave it out; sharding.reshard_after_forward says when gathered weights are freed"
        )
    return None


@rule("sharding.engine", "sharding.reshard_after_forward", "sharding.replicas")
def _fsdp_has_its_own_options(engine: str, reshard_after_forward: bool, replicas: int) -> tuple[str, str] | None:
    for name, given in (("reshard_after_forward", not reshard_after_forward), ("replicas", replicas != 1)):
        if given and engine not in ("fsdp", "auto"):
            return f"sharding.{name}", f'needs sharding.engine "fsdp", which is "{engine}"'
    return None


@rule("sharding.engine", "sharding.zero_stage", "sharding.offload_optimizer", "sharding.offload_parameters")
def _offload_has_an_engine(
    engine: str, zero_stage: int | str | None, offload_optimizer: bool, offload_parameters: bool
) -> tuple[str, str] | None:
    for name, given in (("offload_optimizer", offload_optimizer), ("offload_parameters", offload_parameters)):
        if given and engine == "single":
            return f"sharding.{name}", 'sharding.engine "single" cannot offload: set it to false'
    if engine == "fsdp" and offload_optimizer != offload_parameters:
        return "sharding.offload_parameters", (
            "FSDP2 offloads weights and the optimiser's state together: set offload_optimizer and offload_parameters "
            "alike"
        )
    if engine == "deepspeed" and offload_parameters and zero_stage not in (None, 3, "auto"):
        return "sharding.offload_parameters", f"needs sharding.zero_stage 3, which is {zero_stage}"
    if engine == "deepspeed" and offload_optimizer and zero_stage == 0:
        return "sharding.offload_optimizer", "needs a sharding.zero_stage of at least 1, which is 0"
    return None


@rule("sharding.engine", "sharding.offload_optimizer", "optimizer.precision")
def _deepspeed_offloads_masters(engine: str, offload_optimizer: bool, precision: str) -> tuple[str, str] | None:
    if engine == "deepspeed" and precision == "pure_bf16" and offload_optimizer:
        return "sharding.offload_optimizer", (
            'DeepSpeed does not offload bf16 weights without a master: use optimizer.precision "fp32_master"'
        )
    return None


@rule("sharding.engine", "optimizer.loss_scale")
def _deepspeed_scales_by_powers_of_two(engine: str, scale: Any) -> tuple[str, str] | None:
    if engine != "deepspeed" or scale is None or isinstance(scale, float | int):
        return None
    options = LossScaleConfig.model_validate(scale)
    if math.frexp(options.initial)[0] != 0.5:
        return "optimizer.loss_scale", (
            f"DeepSpeed starts with a power of two, and initial is {options.initial}: set it to one, such as 65536"
        )
    if options.minimum < 1 or options.minimum != int(options.minimum):
        return "optimizer.loss_scale", f"DeepSpeed's minimum is a whole number of at least 1, not {options.minimum}"
    return None
