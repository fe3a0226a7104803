"""The precisions of `optimizer.precision`, and what each costs in bytes. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """How weights are held and how forward passes compute.

    Attributes:
        autocast: dtype of autocast regions; None computes in the weights' own dtype.
        loss_scaling: gradients are scaled up so that fp16 does not lose small ones.
        stochastic_rounding: weights and moments are bf16, stored with stochastic rounding.
        weight_bytes: per parameter; gradients have the dtype of the weights.
        state_bytes: per trainable parameter, both AdamW moments together.
    """

    autocast: str | None
    loss_scaling: bool
    stochastic_rounding: bool
    weight_bytes: int
    state_bytes: int


PRECISIONS = {
    "fp32": Precision(None, False, False, weight_bytes=4, state_bytes=8),
    "fp32_master": Precision("bfloat16", False, False, weight_bytes=4, state_bytes=8),
    "pure_bf16": Precision(None, False, True, weight_bytes=2, state_bytes=4),
    "fp16": Precision("float16", True, False, weight_bytes=4, state_bytes=8),
}
