"""Attention of the replay: selected queries against all keys, with gradient to the selected ones alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from framework.retention.attention.ops import attend, attend_backward


@dataclass(frozen=True)
class ReplayCall:
    """What a replayed attention knows beforehand.

    Attributes:
        keys: all keys `[batch, kv_heads, tokens, size]`, and what they are multiplied by if they are integers.
        values: the same for the values.
        first: the first key that each selected query sees, int32 `[batch, slots]`.
        last: the last one; less than `first` where a sequence has fewer selected tokens.
        positions: of the selected tokens, int32 `[batch, slots]`, -1 where a sequence has fewer.
        scale: of the scores.
        known: output `[batch, heads, slots, value_size]` and log-sum-exp `[batch, heads, slots]`, if the record pass
            kept them.
    """

    keys: tuple[Tensor, Tensor | None]
    values: tuple[Tensor, Tensor | None]
    first: Tensor
    last: Tensor
    positions: Tensor
    scale: float
    known: tuple[Tensor, Tensor] | None


class ReplayedAttention(torch.autograd.Function):
    """Output and log-sum-exp of selected queries. Keys and values at other positions are constants."""

    @staticmethod
    def forward(ctx: Any, call: list[ReplayCall], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`query`, `key`, `value` `[batch, heads or kv_heads, slots, size]`, at the selected positions."""
        (known,) = call
        (keys, key_scale), (values, value_scale) = known.keys, known.values
        output, lse = known.known or attend(
            query, keys, values, key_scale, value_scale, known.first, known.last, known.scale, None
        )
        # Without the output, which refers to this node: the two would keep each other, and all that the graph holds.
        ctx.call = replace(known, known=None)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        """Gradients of the three."""
        known, (query, key, value, output, lse) = ctx.call, ctx.saved_tensors
        (keys, key_scale), (values, value_scale) = known.keys, known.values
        grad_query, grad_key, grad_value = attend_backward(
            grad,
            query,
            keys,
            values,
            key_scale,
            value_scale,
            output,
            lse,
            known.first,
            known.last,
            key,
            value,
            known.positions,
            known.scale,
            None,
        )
        return None, grad_query, grad_key, grad_value


class ScaledGradient(torch.autograd.Function):
    """Identity whose backward multiplies the gradient by `factor`, of a shape that broadcasts."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, tensor: Tensor) -> Tensor:
        """`tensor`, unchanged."""
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """The scaled gradient."""
        return None, (grad * ctx.factor).to(grad.dtype)


def replayed_attention(
    call: ReplayCall, query: Tensor, key: Tensor, value: Tensor, correction: Tensor | None
) -> Tensor:
    """The output `[batch, heads, slots, value_size]` of selected queries.

    Args:
        call: what is known.
        query: `[batch, heads, slots, size]`.
        key: the keys at the selected positions, `[batch, kv_heads, slots, size]`.
        value: the values there, `[batch, kv_heads, slots, value_size]`.
        correction: float32 `[batch, slots]`, by which the gradient is multiplied that a key and its value get from
            the queries of other tokens; None for one.
    """
    if correction is None:
        output, _ = ReplayedAttention.apply([call], query, key, value)
        return output
    factor = correction[:, None, :, None]
    output, lse = ReplayedAttention.apply(
        [call], query, ScaledGradient.apply(factor, key), ScaledGradient.apply(factor, value)
    )
    groups = query.shape[1] // key.shape[1]
    score = (query.detach().to(lse.dtype) * key.detach().repeat_interleave(groups, 1)).sum(-1) * call.scale
    sees_itself = (call.first <= call.positions) & (call.positions <= call.last)
    probability = (score - lse).exp().where(sees_itself[:, None], 0.0)
    return output + own_key_term(query, key, value, output, probability, 1 - factor, scale=call.scale)


def own_key_term(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    probability: Tensor,
    share: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Zeros whose gradient is `share` of what each token's query sends into its own key and value.

    A query i sends into its value v the gradient p·g, and into its key k the gradient p·g·(v - o)·s·q, with p the
    probability of key i, g the gradient of the output o and s the scale times the derivative of the soft cap.

    Args:
        query: `[batch, heads, slots, size]`.
        key: `[batch, kv_heads, slots, size]`.
        value: `[batch, kv_heads, slots, value_size]`.
        output: `[batch, heads, slots, value_size]`.
        probability: of each query's own key, `[batch, heads, slots]`.
        share: `[batch, 1, slots, 1]`.
        scale: of the scores.
        softcap: of the scores, if any.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, known_key, known_value, known_output = (t.detach() for t in (query, key, value, output))
    slope = probability.new_ones(())
    if softcap is not None:
        slope = 1 - ((queries * known_key).sum(-1, keepdim=True) * (scale / softcap)).tanh().square()
    through_key = (queries * (key - known_key)).sum(-1, keepdim=True) * (scale * slope)
    moved = probability[..., None] * share * ((value - known_value) + (known_value - known_output) * through_key)
    return moved.to(output.dtype)
