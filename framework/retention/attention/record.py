"""Attention of the record pass: kernels that say the log-sum-exp of the scores besides the output.

A plain causal or unmasked attention has a choice of kernels. On CUDA the first one of a shape is timed with each, and
the fastest is taken from then on; with torch's deterministic algorithms it is always the first of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from framework.retention.attention.ops import attend
from framework.retention.visibility import KeyRanges

logger = logging.getLogger(__name__)

Attended = tuple[Tensor, Tensor]
Kernel = Callable[[Tensor, Tensor, Tensor, bool, float], Attended]

_HALVES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_LARGEST_CUDNN_HEAD = 128
_CAPABILITY = (8, 0)
"""Compute capability from which on both kernels run."""

_chosen: dict[tuple[object, ...], str] = {}


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Attended:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    return output, lse


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Attended:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return output, lse[..., 0]


KERNELS: dict[str, Kernel] = {"FlashAttention-2": _flash, "cuDNN": _cudnn}
"""Of CUDA devices, for 16-bit types."""


def attend_all(query: Tensor, key: Tensor, value: Tensor, ranges: KeyRanges, scale: float) -> Attended:
    """Attention of all queries, without a graph.

    Args:
        query: `[batch, heads, tokens, size]`.
        key: `[batch, kv_heads, tokens, size]`.
        value: `[batch, kv_heads, tokens, value_size]`.
        ranges: the keys that each query sees.
        scale: of the scores.

    Returns:
        The output `[batch, heads, tokens, value_size]`, and the log-sum-exp `[batch, heads, tokens]`.
    """
    alike = query.shape[-1] == value.shape[-1] and query.shape[2] == key.shape[2]
    plain = alike and (ranges.causal or ranges.everything)
    if plain and query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, ranges.causal, scale=scale
        )
        return output, lse
    if plain and query.is_cuda and query.dtype in _HALVES and query.shape[-1] % 8 == 0:
        if candidates := _candidates(query):
            return _fastest(candidates, query, key, value, ranges.causal, scale)
    batch = query.shape[0]
    first, last = (bound.expand(batch, -1) for bound in (ranges.first, ranges.last))
    output, lse = attend(query, key, value, None, None, first, last, scale, None)
    return output, lse


def _candidates(query: Tensor) -> list[str]:
    if query.shape[-1] > _LARGEST_HEAD or torch.cuda.get_device_capability(query.device) < _CAPABILITY:
        return []
    cudnn = query.shape[-1] <= _LARGEST_CUDNN_HEAD and torch.backends.cudnn.is_available()
    return [*KERNELS] if cudnn else ["FlashAttention-2"]


def _fastest(candidates: list[str], query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Attended:
    """The output of the kernel that is fastest for this shape."""
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return KERNELS[candidates[0]](query, key, value, causal, scale)
    heads, tokens, size = query.shape[1:]
    # Lengths that differ by less than a factor of two share a choice.
    shape = (query.device, query.dtype, heads, key.shape[1], size, tokens.bit_length(), causal)
    if shape not in _chosen:
        times = {name: _milliseconds(KERNELS[name], query, key, value, causal, scale) for name in candidates}
        _chosen[shape] = min(times, key=times.__getitem__)
        told = ", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
        logger.info("record pass attends by %s (%s for %s)", _chosen[shape], told, [*query.shape])
    return KERNELS[_chosen[shape]](query, key, value, causal, scale)


def _milliseconds(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> float:
    """Of the second call; the first one may set something up."""
    kernel(query, key, value, causal, scale)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    kernel(query, key, value, causal, scale)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
