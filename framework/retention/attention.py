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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from framework.retention.block_pass import BlockPass, Phase, RetainedAttention, current_pass
from framework.retention.formats import KV_FORMATS
from framework.retention.rows import PutRows, SelectedRows

Kernel = Callable[..., tuple[Tensor, Tensor | None]]

_NO_ATTENTION_DROPOUT = (
    "dropout on attention probabilities is off under token selection: the record pass does not keep the probabilities "
    "that the replay would have to drop again; set the model's attention dropout to 0 to silence this"
)


def _eager_kernel(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The family's own eager attention, which its modelling file passes to the interface as the default."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa_attention_forward, "eager": _eager_kernel}


def selective_name(kernel: str) -> str:
    """The registered name of the selective attention function around a kernel."""
    return f"selective_{kernel}"


def _selective_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Kernel,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the kernel does it; `query`, `key`, `value` `[batch, heads, tokens, size]`.

    In the record pass the tokens are all tokens; in the replay they are the selected ones of all sequences, batch 1.
    """
    current = current_pass()
    if current is None:
        return kernel(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        warnings.warn(_NO_ATTENTION_DROPOUT, stacklevel=2)
    kwargs["dropout"] = 0.0
    if current.phase is Phase.RECORD:
        keep = KV_FORMATS[current.kv_format]
        current.attention.append(RetainedAttention(keep(key), keep(value), attention_mask))
        return kernel(module, query, key, value, attention_mask, **kwargs)
    return _replay(current, kernel, module, query, key, value, **kwargs)


def _replay(
    current: BlockPass, kernel: Kernel, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Selected queries against all keys, of which the selected ones are the replayed, differentiable ones."""
    retained, rows = current.attention.popleft(), current.rows
    keys = PutRows.apply([retained.keys.restore()], rows, key)
    values = PutRows.apply([retained.values.restore()], rows, value)
    queries = rows.by_sequence(query.transpose(1, 2)).transpose(1, 2)
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    mask = _mask_rows(retained.mask, rows, causal)
    output, weights = kernel(module, queries, keys, values, mask, is_causal=False, **kwargs)
    return rows.from_sequences(output), weights


def _mask_rows(mask: Tensor | None, rows: SelectedRows, causal: bool) -> Tensor | None:
    """The selected queries' rows of the mask that the record pass used, `[batch, heads or 1, slots, keys]`.

    Without a mask, a causal module attends to everything up to the query's position.
    """
    if mask is None:
        if not causal:
            return None
        keys = torch.arange(rows.tokens, device=rows.positions.device)
        return (keys <= rows.positions[..., None])[:, None]
    if mask.shape[2] == 1:
        return mask
    by_query = mask.expand(rows.batch, -1, -1, -1).transpose(1, 2)
    return rows.take_slots(by_query).transpose(1, 2)


def register_attention() -> None:
    """Register the selective attention function of every kernel, and its mask function, with transformers."""
    for name, kernel in KERNELS.items():
        AttentionInterface.register(selective_name(name), partial(_selective_attention, kernel=kernel))
        AttentionMaskInterface.register(selective_name(name), ALL_MASK_ATTENTION_FUNCTIONS[name])
