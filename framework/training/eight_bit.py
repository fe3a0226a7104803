"""AdamW whose moments are held in 8 bits (arXiv 2110.02861), with the kernels of bitsandbytes.

A moment is cut into blocks of 256 elements in row-major order; an element is a code, one of 256 fixed values times its
block's largest magnitude. In float32 the same values are `exp_avg` and `exp_avg_sq`, in which they leave the optimiser
and come back: so any engine with any number of ranks can read them, and what comes back in the blocks that it left in
is what it was, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from framework.extras import bitsandbytes

BLOCK = 256
"""Elements of a moment with a common scale."""
MINIMUM_SIZE = 4096
"""Tensors of fewer elements have float32 moments."""

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""The moments' names, and whether they have a sign."""

# Elements whose codes are looked for at once, which takes some 30 bytes each.
_SLAB = 1 << 22
# In float32 numbers: how far a scale may be off that is computed from a rounded product with it.
_ULPS = 2


class EightBitAdamW(torch.optim.Optimizer):
    """What `bitsandbytes.optim.AdamW8bit` computes, on plain tensors and on what this rank holds of DTensors.

    Bytes per parameter: moments 1 + 1, and 8 for each 256 (torch's AdamW on float32: 8). The state of a parameter:
    `step`, a float32 scalar; `exp_avg_codes` and `exp_avg_sq_codes`, uint8 in the shape of what this rank holds of the
    parameter; `exp_avg_scales` and `exp_avg_sq_scales`, float32 `[blocks]`. A parameter of which this rank holds fewer
    than `MINIMUM_SIZE` elements has float32 `exp_avg` and `exp_avg_sq`.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; gradients are left as they are."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def exported_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state as torch's AdamW has it; copies, in the shape of what this rank holds of it.

        Returns:
            `step`, and float32 `exp_avg` and `exp_avg_sq`; nothing before the first step.
        """
        state = self.state.get(parameter, {})
        if not state or "exp_avg" in state:
            return {name: value.clone() for name, value in state.items()}
        values = {
            name: _dequantise(state[f"{name}_codes"], state[f"{name}_scales"], signed)
            for name, signed in MOMENTS.items()
        }
        return {"step": state["step"].clone(), **values}

    def import_state(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take over a parameter's state.

        Args:
            parameter: one of this optimiser's.
            state: as `exported_state` gives it.
        """
        held, taken = _held(parameter), self._new_state(parameter)
        taken["step"].copy_(state["step"])
        for name, signed in MOMENTS.items():
            values = state[name].to(held.device, torch.float32)
            if name in taken:
                taken[name].copy_(values)
            else:
                _quantise(values, signed, codes=taken[f"{name}_codes"], scales=taken[f"{name}_scales"])
        self.state[parameter] = taken

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        held = _held(parameter)
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for name in MOMENTS:
            if parameter.numel() < MINIMUM_SIZE:
                state[name] = torch.zeros(held.shape, dtype=torch.float32, device=held.device)
            else:
                blocks = -(-held.numel() // BLOCK)
                state[f"{name}_codes"] = torch.zeros(held.shape, dtype=torch.uint8, device=held.device)
                state[f"{name}_scales"] = torch.zeros(blocks, dtype=torch.float32, device=held.device)
        return state

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.state[parameter] = self._new_state(parameter)
        state = self.state[parameter]
        state["step"] += 1
        assert parameter.grad is not None
        held = _held(parameter)
        if not held.numel():
            return
        kernels = bitsandbytes().functional
        weight, gradient, step = held.contiguous(), _held(parameter.grad).contiguous(), int(state["step"])
        beta1, beta2 = group["betas"]
        rate, epsilon, decay = group["lr"], group["eps"], group["weight_decay"]
        if "exp_avg" in state:
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            kernels.optimizer_update_32bit(
                "adam", gradient, weight, mean, beta1, epsilon, step, rate, square, beta2, weight_decay=decay
            )
        else:
            kernels.optimizer_update_8bit_blockwise(
                "adam",
                gradient,
                weight,
                state["exp_avg_codes"],
                state["exp_avg_sq_codes"],
                beta1,
                beta2,
                0.0,
                0.0,
                epsilon,
                step,
                rate,
                _values(True, held.device),
                _values(False, held.device),
                state["exp_avg_scales"],
                state["exp_avg_sq_scales"],
                weight_decay=decay,
            )
        if weight is not held:
            held.copy_(weight)


def eight_bit_state_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of the moments of whole trainable parameters."""
    sizes = [parameter.numel() for parameter in parameters]
    return sum(8 * size if size < MINIMUM_SIZE else 2 * size + 8 * -(-size // BLOCK) for size in sizes)


def _held(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@functools.cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """The values of the codes, float32 `[256]`, ascending; the largest is 1."""
    return bitsandbytes().functional.create_dynamic_map(signed=signed).to(device)


def _dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    values = _values(signed, codes.device)
    return bitsandbytes().functional.dequantize_blockwise(codes, absmax=scales, code=values, blocksize=BLOCK)


def _quantise(moment: Tensor, signed: bool, *, codes: Tensor, scales: Tensor) -> None:
    """Write the codes and scales of a float32 moment; those of one that was dequantised have its very values again."""
    targets = (codes.view(-1).split(_SLAB), scales.split(_SLAB // BLOCK))
    for slab, own_codes, own_scales in zip(moment.reshape(-1).split(_SLAB), *targets, strict=True):
        padding = -slab.numel() % BLOCK
        blocks = torch.nn.functional.pad(slab, (0, padding)).view(-1, BLOCK)
        found, scale = _block_codes(blocks, _values(signed, slab.device), signed)
        own_codes.copy_(found.view(-1)[: slab.numel()])
        own_scales.copy_(scale)


def _block_codes(blocks: Tensor, values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales of float32 `blocks [blocks, 256]`.

    The scale of a block is its largest magnitude, unless that is negative and was quantised before: the most negative
    value is above -1, so that the largest magnitude that is left is that share of the scale. The quotient may be off in
    the last places, for what is left is a rounded product.
    """
    scale = blocks.abs().amax(1)
    codes = _nearest(blocks, scale, values)
    if not signed:
        return codes, scale
    below = above = blocks.amin(1) / values[0]
    candidates = [below]
    for _ in range(_ULPS):
        below, above = below.nextafter(torch.zeros_like(below)), above.nextafter(torch.full_like(above, torch.inf))
        candidates += [below, above]
    left = _differs(blocks, codes, scale, values).nonzero()[:, 0]
    for candidate in candidates:
        others = _nearest(blocks[left], candidate[left], values)
        fits = ~_differs(blocks[left], others, candidate[left], values)
        found, left = left[fits], left[~fits]
        codes[found], scale[found] = others[fits], candidate[found]
    return codes, scale


def _nearest(blocks: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    shares = (blocks / scale[:, None]).nan_to_num()
    return torch.bucketize(shares, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)


def _differs(blocks: Tensor, codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """Whether a block is not exactly what its codes and scale stand for, bool `[blocks]`."""
    return (values[codes.int()] * scale[:, None] != blocks).any(1)
