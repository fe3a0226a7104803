"""Attention of the record pass: torch's kernels, which say the log-sum-exp of the scores besides the output."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.retention.attention.ops import attend
from framework.retention.visibility import KeyRanges

_HALVES = (torch.float16, torch.bfloat16)
_LARGEST_FLASH_HEAD = 256


def attend_all(query: Tensor, key: Tensor, value: Tensor, ranges: KeyRanges, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of all queries, without a graph.

    Where all see all, or all before them, it is the kernel that torch itself takes.

    Args:
        query: `[batch, heads, tokens, size]`.
        key: `[batch, kv_heads, tokens, size]`.
        value: `[batch, kv_heads, tokens, value_size]`.
        ranges: the keys that each query sees.
        scale: of the scores.

    Returns:
        The output `[batch, heads, tokens, value_size]`, and the log-sum-exp `[batch, heads, tokens]`.
    """
    whole = ranges.causal or ranges.everything
    alike = query.shape[-1] == value.shape[-1] and query.shape[2] == key.shape[2]
    if whole and alike and query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, ranges.causal, scale=scale
        )
        return output, lse
    if whole and alike and query.dtype in _HALVES and query.shape[-1] <= _LARGEST_FLASH_HEAD:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, ranges.causal, scale=scale
        )
        return output, lse
    batch = query.shape[0]
    first, last = (bound.expand(batch, -1).contiguous() for bound in (ranges.first, ranges.last))
    output, lse = attend(query, key, value, None, None, first, last, scale, None)
    return output, lse
