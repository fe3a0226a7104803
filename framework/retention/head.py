"""Final norm and head on chosen rows only, on stock models.

The logits of a causal language model are by far its widest activation. Whatever follows the backbone (head, soft cap,
scaling) works row by row, so the backbone's output is reduced to the wanted rows on its way there, and the modelling
file never notices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from framework.retention.blocks import backbone_of, blocks_of


@contextlib.contextmanager
def head_rows(model: PreTrainedModel, index: Tensor) -> Iterator[None]:
    """Within this context the model's final norm and head see chosen rows only; its logits are `[1, rows, width]`.

    Args:
        model: the Hugging Face model with its head (not a PEFT wrapper).
        index: int64 `[rows]`, rows of the flattened `[batch * sequence]` tokens, on the model's device.
    """
    backbone, reduction = backbone_of(model), _Reduction(index)
    handles = [backbone.last_block.register_forward_hook(reduction.note_last_block)]
    for norm in backbone.norms:
        handles.append(norm.register_forward_pre_hook(reduction.reduce_norm_input))
        handles.append(norm.register_forward_hook(reduction.expand_norm_output))
    for module in backbone.chain:
        handles.append(module.register_forward_pre_hook(reduction.enter_backbone))
        handles.append(module.register_forward_hook(reduction.leave_backbone))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reduction:
    """The hooks of one forward pass.

    The final norm's output goes back into its full shape, with zeros elsewhere, because a backbone may reshape it
    (GPT-2 does); the zeros live until the backbone returns.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.after_blocks = False
        self.depth = 0
        self.shape: torch.Size | None = None

    def note_last_block(self, *_: Any) -> None:
        self.after_blocks = True

    def reduce_norm_input(self, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.after_blocks or not args:
            return None
        self.shape = args[0].shape
        return (self._take(args[0]), *args[1:])

    def expand_norm_output(self, norm: nn.Module, args: tuple[Any, ...], rows: Tensor) -> Tensor | None:
        if self.shape is None:
            return None
        shape, self.shape = self.shape, None
        full = rows.new_zeros(shape.numel() // shape[-1], rows.shape[-1])
        return full.index_copy(0, self.index, rows[0]).view(*shape[:-1], -1)

    def enter_backbone(self, *_: Any) -> None:
        self.depth += 1

    def leave_backbone(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.depth -= 1
        return _with_hidden(output, self._take(output[0])) if self.depth == 0 else None

    def _take(self, hidden: Tensor) -> Tensor:
        """`[batch, sequence, width]` to `[1, rows, width]`."""
        return hidden.flatten(0, -2).index_select(0, self.index)[None]


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """A backbone's output with other hidden states."""
    if isinstance(output, ModelOutput):
        return type(output)(**{**output, "last_hidden_state": hidden})
    return (hidden, *output[1:])


def run_backbone(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """The backbone's output for `inputs` (without labels), last hidden states `[batch, sequence, width]` first.

    It runs inside the model's own forward, whose hooks gather sharded weights; the head sees a single row.
    """
    chain, depth, outputs = backbone_of(model).chain, 0, []

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(backbone: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal depth
        depth -= 1
        if depth > 0:
            return None
        outputs.append(output)
        return _with_hidden(output, output[0][:1, :1])

    handles = [module.register_forward_pre_hook(enter) for module in chain]
    handles += [module.register_forward_hook(leave) for module in chain]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs[0]


def run_head(model: PreTrainedModel, backbone_output: Any, rows: Tensor) -> Tensor:
    """Logits `[rows, classes]` for rows `[rows, width]` of the backbone's last hidden states.

    The model's own forward computes them from a backbone that is replaced, for this call, by these rows.
    """
    known = _with_hidden(backbone_output, rows[None])
    chain = backbone_of(model).chain
    previous = [vars(module).get("forward") for module in chain]
    for module in chain:
        module.forward = lambda *_, **__: known
    try:
        return model(input_ids=torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)).logits[0]
    finally:
        for module, forward in zip(chain, previous, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def rows_read_by_head(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Which tokens of the last block's output a classifier's logits depend on, bool `[batch, tokens]`.

    Found by a backward pass from random weights on the logits to the last block's output. The model's mode, gradients
    and random state stay as they are.

    Args:
        model: The Hugging Face model with its head (not a PEFT wrapper).
        inputs: What it takes, without labels.
    """
    rows: list[Tensor] = []

    def cut(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rows.append((output[0] if isinstance(output, tuple) else output).detach().requires_grad_())
        return (rows[0], *output[1:]) if isinstance(output, tuple) else rows[0]

    training = model.training
    handle = [*blocks_of(model).values()][-1].register_forward_hook(cut)
    model.eval()
    try:
        logits = model(**inputs).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), rows[0])
    finally:
        model.train(training)
        handle.remove()
    return gradient.abs().sum(-1) > 0
