"""Attention of the record pass: kernels that say the log-sum-exp of the scores besides the output.

A plain causal or unmasked attention has a choice of kernels: those of torch, and of the package flash-attn where that
is installed. On CUDA the first one of a shape is timed with each, and the fastest is taken from then on; with torch's
deterministic algorithms it is always the first of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

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
"""Compute capability from which on the kernels run."""
_HOPPER = (9, 0)

_chosen: dict[tuple[object, ...], str] = {}


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Attended:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    return output, lse


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Attended:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return output, lse[..., 0]


def _packaged(
    attend: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> Attended:
    """`attend` is a `flash_attn_func`; it wants the heads behind the tokens."""
    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, lse, *_ = attend(*tensors, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return output.transpose(1, 2), lse


KERNELS: dict[str, Kernel] = {"FlashAttention-2": _flash, "cuDNN": _cudnn}
"""Torch's own on CUDA devices, for 16-bit types."""

PACKAGES = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}
"""Modules of Dao-AILab's packages that have a `flash_attn_func`; the second is for Hopper alone."""


@cache
def packaged_kernels() -> dict[str, Kernel]:
    """Kernels of the packages that are installed; one that cannot be imported is left out with a warning."""
    found: dict[str, Kernel] = {}
    for name, module in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            attend = importlib.import_module(module).flash_attn_func
        except (ImportError, OSError, AttributeError) as error:
            # Builds for another torch fail in the loader.
            logger.warning("%s is installed but cannot be used: %s", name, error)
            continue
        found[name] = partial(_packaged, attend)
    return found


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


def _candidates(query: Tensor) -> dict[str, Kernel]:
    capability = torch.cuda.get_device_capability(query.device)
    if query.shape[-1] > _LARGEST_HEAD or capability < _CAPABILITY:
        return {}
    found = KERNELS | packaged_kernels()
    if query.shape[-1] > _LARGEST_CUDNN_HEAD or not torch.backends.cudnn.is_available():
        del found["cuDNN"]
    if capability != _HOPPER:
        found.pop("flash-attn 3", None)
    return found


def _fastest(
    candidates: dict[str, Kernel], query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> Attended:
    """The output of the kernel that is fastest for this shape."""
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        first = next(iter(candidates.values()))
        return first(query, key, value, causal, scale)
    heads, tokens, size = query.shape[1:]
    # Lengths that differ by less than a factor of two share a choice.
    shape = (query.device, query.dtype, heads, key.shape[1], size, tokens.bit_length(), causal)
    if shape not in _chosen:
        times = {name: _milliseconds(kernel, query, key, value, causal, scale) for name, kernel in candidates.items()}
        _chosen[shape] = min(times, key=times.__getitem__)
        told = ", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
        logger.info("record pass attends by %s (%s for %s)", _chosen[shape], told, [*query.shape])
    return candidates[_chosen[shape]](query, key, value, causal, scale)


def _milliseconds(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> float:
    """Of the second call; the first one may set something up."""
    kernel(query, key, value, causal, scale)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    kernel(query, key, value, causal, scale)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
