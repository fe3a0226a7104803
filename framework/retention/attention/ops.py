"""The two operators of a replay's attention, for which each device has its own implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.retention.attention import tiled


@torch.library.custom_op("selectrain::attend", mutates_args=(), device_types="cpu")
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
    return tiled.attend(query, key, value, key_scale, value_scale, first, last, scale, softcap)


@attend.register_fake
def _(
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
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    return output, query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("selectrain::attend_backward", mutates_args=(), device_types="cpu")
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
    gradients = tiled.attend_backward(
        grad, query, key, value, key_scale, value_scale, output, lse, first, last, positions, scale, softcap
    )
    # Stored as what they are gradients of, as the kernels on CUDA do.
    like = query, selected_key, selected_value
    grad_query, grad_key, grad_value = (torch.empty_like(of).copy_(g) for of, g in zip(like, gradients, strict=True))
    return grad_query, grad_key, grad_value


@attend_backward.register_fake
def _(
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
    return torch.empty_like(query), torch.empty_like(selected_key), torch.empty_like(selected_value)


@attend.register_kernel("cuda")
def _(
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
    from framework.retention import replay_kernels as kernels

    return kernels.attend(
        query,
        key,
        value,
        first,
        last,
        scale=scale,
        softcap=softcap,
        key_scale=key_scale,
        value_scale=value_scale,
    )


@attend_backward.register_kernel("cuda")
def _(
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
    from framework.retention import replay_kernels as kernels

    return kernels.attend_backward(
        grad,
        query,
        key,
        value,
        output,
        lse,
        first,
        last,
        selected_key,
        selected_value,
        positions,
        scale=scale,
        softcap=softcap,
        key_scale=key_scale,
        value_scale=value_scale,
    )
