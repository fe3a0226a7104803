"""Exact training with least memory: what selective training is measured against beside plain checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from framework.retention.host import HostStore, Kept

ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def apply_best_checkpointing(model: PreTrainedModel, *, keep_attention: bool = True) -> None:
    """Recompute every block but its attention, with block inputs on the host.

    Args:
        model: changed in place.
        keep_attention: whether attention's output is kept, so that it is computed once.
    """
    store = HostStore(ahead=2)
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION)

    def run(function: Any, hidden: Tensor, *others: Any, **keywords: Any) -> Any:
        def is_input(tensor: Tensor) -> bool:
            return tensor.data_ptr() == hidden.data_ptr()

        with kept_on_host(store, is_input):
            return checkpoint(function, hidden, *others, **options, **keywords)

    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)


def kept_on_host(store: HostStore, wanted: Callable[[Tensor], bool]) -> torch.autograd.graph.saved_tensors_hooks:
    """Within this context what autograd saves is kept on the host, where `wanted` says so."""

    def pack(tensor: Tensor) -> Any:
        return store.keep([tensor]) if wanted(tensor) else tensor

    def unpack(kept: Any) -> Tensor:
        return kept.fetch()[0] if isinstance(kept, Kept) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
