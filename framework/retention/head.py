"""Final norm and head on chosen rows only, on stock models.

The logits of a causal language model are by far its widest activation. Whatever follows the backbone (head, soft cap,
scaling) works row by row, so the backbone's output is reduced to the wanted rows on its way there, and the modelling
file never notices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from framework.retention.blocks import backbone_of, blocks_of


@contextlib.contextmanager
def forward_in_place(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context a module has another forward; its hooks stay at work around it."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


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


@contextlib.contextmanager
def head_in_chunks(
    model: PreTrainedModel, index: Tensor, chunks: int, consume: Callable[[Tensor, Tensor], None]
) -> Iterator[None]:
    """Within this context the model's forward pass hands the logits of chosen rows over in parts, and returns none.

    The head runs inside of the model's own forward pass, where gathered weights are at hand under any sharding. It is
    called `chunks` times and once more, however many rows there are. For evaluation, without a graph.

    Args:
        model: the Hugging Face model with its head (not a PEFT wrapper).
        index: int64 `[rows]`, rows of the flattened `[batch * sequence]` tokens, on the model's device.
        chunks: number of parts.
        consume: called with the logits `[part, classes]` and where they belong, int64 `[part]`, numbers of rows.
    """
    chain, chunking = backbone_of(model).chain, _Chunking(model, index, chunks, consume)
    handles = [module.register_forward_pre_hook(chunking.enter_backbone) for module in chain]
    handles += [module.register_forward_hook(chunking.leave_backbone) for module in chain]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Chunking:
    """The hooks of one forward pass with its head in parts."""

    def __init__(
        self, model: PreTrainedModel, index: Tensor, chunks: int, consume: Callable[[Tensor, Tensor], None]
    ) -> None:
        self.model, self.index, self.chunks, self.consume = model, index, chunks, consume
        self.depth = 0
        self.in_head = False

    def enter_backbone(self, *_: Any) -> None:
        self.depth += 1

    def leave_backbone(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.depth -= 1
        if self.depth or self.in_head:
            return None
        tokens = output[0].flatten(0, -2)
        self.in_head = True
        for part in torch.arange(len(self.index), device=tokens.device).tensor_split(self.chunks):
            # Every part runs, even an empty one, on the first token then: ranks call modules equally often.
            logits = self._head(output, tokens[self.index[part]] if len(part) else tokens[:1])
            if len(part):
                self.consume(logits, part)
        self.in_head = False
        return _with_hidden(output, tokens[None, :1])

    def _head(self, output: Any, rows: Tensor) -> Tensor:
        """Logits of rows `[part, width]`: the model's own forward, over a backbone that is replaced by these rows.

        Not a call of the model, whose hooks are at work around this one.
        """
        known = _with_hidden(output, rows[None])
        ids = torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)
        with contextlib.ExitStack() as stack:
            for module in backbone_of(self.model).chain:
                stack.enter_context(forward_in_place(module, lambda *_, **__: known))
            return self.model.forward(input_ids=ids).logits[0]


@torch.no_grad()
def head_reads(model: PreTrainedModel, inputs: dict[str, Any], rows: Tensor) -> bool:
    """Whether a classifier's logits depend on chosen tokens of its last block's output.

    Found by running the model once as it is and once with noise in these rows. The model's mode and random state stay
    as they are.

    Args:
        model: The Hugging Face model with its head (not a PEFT wrapper).
        inputs: What it takes, without labels.
        rows: bool `[batch, tokens]`, on the model's device.
    """

    def disturb(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        changed = torch.where(rows[..., None], noise, hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    training = model.training
    model.eval()
    try:
        plain = model(**inputs).logits
        handle = [*blocks_of(model).values()][-1].register_forward_hook(disturb)
        try:
            disturbed = model(**inputs).logits
        finally:
            handle.remove()
    finally:
        model.train(training)
    return not torch.equal(plain, disturbed)
