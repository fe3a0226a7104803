"""Attention functions that keep keys and values in the record pass and use them in the replay.

They are registered with transformers' `AttentionInterface` under `selective_<kernel>`, together with the mask function
of the kernel they wrap, so that a model switches to them by name and its modelling code stays as it is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from framework.retention.attention.record import attend_all
from framework.retention.attention.replay import ReplayCall, ScaledGradient, own_key_term, replayed_attention
from framework.retention.block_pass import BlockPass, Phase, RetainedAttention, current_pass
from framework.retention.formats import KV_FORMATS
from framework.retention.rows import PutRows, SelectedRows
from framework.retention.visibility import KeyRanges, Visibility, describing_mask

Kernel = Callable[..., tuple[Tensor, Tensor | None]]

_NO_ATTENTION_DROPOUT = (
    "dropout on attention probabilities is off under token selection: the record pass does not keep the probabilities "
    "that the replay would have to drop again; set the model's attention dropout to 0 to silence this"
)


def _eager_kernel(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The family's own eager attention, which its modelling file passes to the interface as the default."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa_attention_forward, "eager": _eager_kernel}

_NOT_PLAIN = {"sdpa": ("position_bias", "cache", "softcap")}
"""Of kernels that do the same for every family: arguments that make of them something else than a softmax of scaled
products. Eager attention is each family's own, and is replayed by itself."""


def selective_name(kernel: str) -> str:
    """The registered name of the selective attention function around a kernel."""
    return f"selective_{kernel}"


@torch.compiler.disable
def _selective_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Visibility | None,
    *,
    name: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the kernel does it; `query`, `key`, `value` `[batch, heads, tokens, size]`.

    In the record pass the tokens are all tokens; in the replay they are the selected ones of all sequences, batch 1.
    """
    current, kernel = current_pass(), KERNELS[name]
    if current is None:
        return kernel(module, query, key, value, _native(attention_mask), **kwargs)
    if kwargs.get("dropout"):
        warnings.warn(_NO_ATTENTION_DROPOUT, stacklevel=2)
    kwargs["dropout"] = 0.0
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if current.phase is Phase.REPLAY:
        retained = current.attention.popleft()
        if retained.ranges is None:
            return _replay_by_kernel(current.rows, retained, kernel, module, query, key, value, scale, **kwargs)
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
        return _replay(current, retained, query, key, value, scale), None
    ranges = _ranges(name, module, attention_mask, key, kwargs)
    current.precision = max(current.precision, torch.finfo(query.dtype).eps)
    keep = KV_FORMATS[current.kv_format]
    if ranges is None:
        mask = _native(attention_mask)
        current.keep(RetainedAttention(keep(key), keep(value), mask=mask))
        return kernel(module, query, key, value, mask, **kwargs)
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    retained = RetainedAttention(keep(key), keep(value), ranges=ranges)
    current.keep(retained)
    output, lse = attend_all(query, key, value, ranges, scale)
    output = output.transpose(1, 2)
    if current.retain_linears:
        retained.known = current.rows.take(output), current.rows.take(lse.transpose(1, 2))
    return output, None


def _autocast(tensor: Tensor) -> Tensor:
    """As torch's own attention casts under autocast."""
    device = tensor.device.type
    if tensor.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _native(mask: Tensor | Visibility | None) -> Any:
    return mask.native if isinstance(mask, Visibility) else mask


def _ranges(
    name: str, module: nn.Module, mask: Tensor | Visibility | None, key: Tensor, kwargs: dict[str, Any]
) -> KeyRanges | None:
    """The keys of each query, or None where the kernel does more than a softmax over an interval of keys."""
    if name not in _NOT_PLAIN or any(kwargs.get(argument) is not None for argument in _NOT_PLAIN[name]):
        return None
    if isinstance(mask, Visibility):
        return mask.ranges
    if mask is not None:
        return None
    return KeyRanges.all_keys(key.shape[2], key.device, causal=_is_causal(module, kwargs.get("is_causal")))


def _is_causal(module: nn.Module, asked: bool | None) -> bool:
    """Whether attention without a mask is causal, as transformers' kernels take it."""
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _replay(
    current: BlockPass, retained: RetainedAttention, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Selected queries against all keys; `[1, rows, heads, size]`."""
    rows, ranges = current.rows, retained.ranges
    assert ranges is not None
    first, last = rows.ranges(ranges)
    known = None
    if retained.known is not None:
        output, lse = retained.known
        known = rows.by_sequence(output).transpose(1, 2), rows.by_sequence(lse).transpose(1, 2)
    call = ReplayCall(
        retained.keys.operands(key, rows),
        retained.values.operands(value, rows),
        first,
        last,
        rows.positions,
        scale,
        known,
    )
    by_row = query.transpose(1, 2), rows.cut(key.transpose(1, 2)), rows.cut(value.transpose(1, 2))
    slots = (rows.by_sequence(tensor).transpose(1, 2) for tensor in by_row)
    return rows.from_sequences(replayed_attention(call, *slots, rows.correction).transpose(1, 2))


def _replay_by_kernel(
    rows: SelectedRows,
    retained: RetainedAttention,
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Selected queries against all keys, of which the selected ones are the replayed, differentiable ones.

    Raises:
        ValueError: the gradient wants a correction, and the kernel does not say its probabilities.
    """
    counted_key, counted_value = key, value
    if rows.correction is not None:
        factor = rows.from_sequences(rows.correction)[:, None, :, None]
        counted_key, counted_value = ScaledGradient.apply(factor, key), ScaledGradient.apply(factor, value)
    keys = PutRows.apply(retained.keys, rows, counted_key)
    values = PutRows.apply(retained.values, rows, counted_value)
    queries = rows.by_sequence(query.transpose(1, 2)).transpose(1, 2)
    mask = _mask_rows(retained.mask, rows, _is_causal(module, kwargs.pop("is_causal", None)))
    output, weights = kernel(module, queries, keys, values, mask, is_causal=False, **kwargs)
    output = rows.from_sequences(output)
    if rows.correction is None:
        return output, weights
    if weights is None:
        raise ValueError(
            "selection.correction: this attention does not say its probabilities, which the correction needs; load the "
            'model with attn_implementation="eager"'
        )
    place = rows.positions.clamp(min=0).long()[:, None, :, None].expand(-1, weights.shape[1], -1, 1)
    probability = rows.from_sequences(weights.detach().gather(-1, place)[..., 0].transpose(1, 2)).transpose(1, 2)
    softcap = kwargs.get("softcap")
    own = own_key_term(query, key, value, output.transpose(1, 2), probability, 1 - factor, scale=scale, softcap=softcap)
    return output + own.transpose(1, 2), weights


def _mask_rows(mask: Tensor | None, rows: SelectedRows, causal: bool) -> Tensor | None:
    """The selected queries' rows of the mask that the record pass used, `[batch, heads or 1, slots, keys]`.

    Without a mask, a causal module attends to everything up to the query's position.
    """
    if mask is None:
        if not causal:
            return None
        keys = torch.arange(rows.tokens, device=rows.positions.device)
        return (keys <= rows.positions.clamp(min=0)[..., None])[:, None]
    if mask.shape[2] == 1:
        return mask
    by_query = mask.expand(rows.batch, -1, -1, -1).transpose(1, 2)
    return rows.take_slots(by_query).transpose(1, 2)


def register_attention() -> None:
    """Register the selective attention function of every kernel, and its mask function, with transformers."""
    for name in KERNELS:
        AttentionInterface.register(selective_name(name), partial(_selective_attention, name=name))
        AttentionMaskInterface.register(selective_name(name), describing_mask(name))
