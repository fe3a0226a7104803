"""The two operators of a replay's attention, for which each device has its own implementation.

On CUDA it is the Triton kernels of `replay_kernels`, which are imported where there is a device: Triton comes with
torch's builds for GPUs only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from framework.retention.attention import tiled

_AS_GIVEN = partial(torch.autocast, "cpu", enabled=False)
"""Tiles multiply in float32 or better, whatever the block around computes in."""


@torch.library.custom_op("selectrain::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    first: Tensor,
    last: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `tiled.attend`."""
    if query.is_cuda:
        from framework.retention.attention import replay_kernels

        scales = {"key_scale": key_scale, "value_scale": value_scale}
        return replay_kernels.attend(query, key, value, first, last, scale=scale, softcap=softcap, **scales)
    with _AS_GIVEN():
        return tiled.attend(query, key, value, key_scale, value_scale, first, last, scale, softcap)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, slots, _ = query.shape
    output = query.new_empty(batch, slots, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("selectrain::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    output: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    selected_key: Tensor,
    selected_value: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `tiled.attend_backward`; `selected_key` and `selected_value` are the keys and values at `positions`."""
    if query.is_cuda:
        from framework.retention.attention import replay_kernels

        selected = selected_key, selected_value, positions
        scales = {"key_scale": key_scale, "value_scale": value_scale}
        return replay_kernels.attend_backward(
            grad, query, key, value, output, lse, first, last, *selected, scale=scale, softcap=softcap, **scales
        )
    with _AS_GIVEN():
        gradients = tiled.attend_backward(
            grad, query, key, value, key_scale, value_scale, output, lse, first, last, positions, scale, softcap
        )
    # Stored as what they are gradients of, as the kernels on CUDA do.
    like = query, selected_key, selected_value
    grad_query, grad_key, grad_value = (torch.empty_like(of).copy_(g) for of, g in zip(like, gradients, strict=True))
    return grad_query, grad_key, grad_value


@attend_backward.register_fake
def _(grad: Tensor, query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    selected_key, selected_value = others[8:10]
    return torch.empty_like(query), torch.empty_like(selected_key), torch.empty_like(selected_value)
