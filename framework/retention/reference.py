"""The slow reference of token-selective gradients: ordinary autograd with the unselected rows detached.

In every block, rows outside the selection are detached at the block's input and output, and keys and values outside
the selection in the attention function. Blocks that fall back detach at input and output only. It keeps everything
that ordinary autograd keeps; it exists to check the fast way against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from framework.retention.attention import KERNELS, Kernel
from framework.retention.block import map_first_output
from framework.retention.blocks import blocks_of

_SELECTED: ContextVar[Tensor | None] = ContextVar("reference_selection", default=None)


@contextlib.contextmanager
def reference_gradients(model: PreTrainedModel, mask: Tensor, fallbacks: Collection[str] = ()) -> Iterator[None]:
    """Within this context the model's ordinary forward and backward give the reference gradients.

    Args:
        model: a Hugging Face model without selection or checkpointing, in its ordinary attention.
        mask: bool `[batch, sequence]`, the selected positions. If the model is given the last tokens only and a cache
            of those before, these are the last columns.
        fallbacks: names of the blocks that fall back.
    """
    kernel = model.config._attn_implementation
    blocks = blocks_of(model)

    def cut_input(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (_cut(args[0], mask), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _cut(kwargs["hidden_states"], mask)}

    def cut_output(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        _SELECTED.set(None)
        return map_first_output(output, lambda hidden: _cut(hidden, mask))

    handles = []
    for name, block in blocks.items():
        selected = None if name in fallbacks else mask
        handles.append(block.register_forward_pre_hook(cut_input, with_kwargs=True))
        handles.append(block.register_forward_pre_hook(partial(_enter_block, selected)))
        handles.append(block.register_forward_hook(cut_output))
    model.set_attn_implementation(f"reference_{kernel}")
    try:
        yield
    finally:
        model.set_attn_implementation(kernel)
        for handle in handles:
            handle.remove()


def _enter_block(selected: Tensor | None, block: nn.Module, args: tuple[Any, ...]) -> None:
    _SELECTED.set(selected)


def _cut(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor [batch, tokens, width]` with the rows outside the mask detached."""
    return torch.where(mask[:, -tensor.shape[1] :, None], tensor, tensor.detach())


def _reference_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, kernel: Kernel, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The kernel's attention with keys and values outside the selection detached."""
    selected = _SELECTED.get()
    if selected is not None:
        keep = selected[:, None, :, None]
        key, value = torch.where(keep, key, key.detach()), torch.where(keep, value, value.detach())
    return kernel(module, query, key, value, mask, **{**kwargs, "dropout": 0.0})


for _name, _kernel in KERNELS.items():
    AttentionInterface.register(f"reference_{_name}", partial(_reference_attention, kernel=_kernel))
    AttentionMaskInterface.register(f"reference_{_name}", ALL_MASK_ATTENTION_FUNCTIONS[_name])
