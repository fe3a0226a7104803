"""Head and cross-entropy in one, by chunks of rows, so that no more than a chunk's logits ever exist.

Each chunk's logits are turned into their gradient as soon as they are there, and this into the chunk's share of the
gradients of the rows and of the head's weight, still in the forward pass: three products as in ordinary training, not
four as with recomputation (Liger Kernel, arXiv 2410.10989, section 3.2). The backward pass only scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from framework.retention import OutputLayer, forward_in_place, head_rows

CHUNK_ROWS = 1024
"""Rows whose logits exist at one time. So many keep a GPU's matrix units busy; with a vocabulary of 128k their logits
take 0.25 GiB in 16 bits and 0.5 GiB in float32, less than the gradient of a weight of width 4096."""

After = Callable[[Tensor], Tensor]
"""What a model does to its head's results `[1, rows, classes]`; the same tensor where it does nothing."""


@dataclass
class FusedLoss:
    """What a forward pass leaves behind.

    Attributes:
        value: the loss, `[]`, with a graph.
    """

    value: Tensor | None = None

    def put_into(self, output: Any) -> Any:
        """The model's output, a tuple or a `ModelOutput`, with this loss and without logits."""
        assert self.value is not None
        if isinstance(output, tuple):
            return (self.value, *output[1:])
        return type(output)(**{**output, "loss": self.value, "logits": None})


@contextmanager
def fused_loss(
    model: PreTrainedModel,
    layer: OutputLayer,
    index: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    count: Tensor | float,
) -> Iterator[FusedLoss]:
    """Within this context a forward pass of the model makes Σ weight · cross-entropy / count, and no logits.

    The head is called once, with all rows, whatever their number. The loss comes out of that call, so that what engines
    hang on its result is part of the graph; the model goes on with the logits of one row, which mean nothing.

    Args:
        model: the Hugging Face model with its head (not a PEFT wrapper).
        layer: its `output_layer_of`.
        index: int64 `[rows]`, rows of the flattened `[batch * sequence]` tokens, on the model's device.
        targets: int64 `[rows]`.
        weights: `[rows]`, or None for ones.
        count: what the sum is divided by.
    """
    linear, found = layer.linear, FusedLoss()

    def forward(input: Tensor) -> Tensor:
        loss = FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's Functions are not annotated
            input.flatten(0, -2), linear.weight, linear.bias, targets, weights, count, layer.after
        )
        return cast(Tensor, loss)

    def take(linear: nn.Module, args: Any, loss: Tensor) -> Tensor:
        found.value = loss
        return args[0].new_zeros(1, 1, layer.linear.out_features)

    # Behind the hooks of engines.
    handle = linear.register_forward_hook(take)
    try:
        with forward_in_place(linear, forward), head_rows(model, index):
            yield found
    finally:
        handle.remove()


class FusedCrossEntropy(torch.autograd.Function):
    """Σ weight · cross-entropy of `after(rows @ matrixᵀ + bias)` / count, in float32 or better.

    Products are computed in the rows' dtype, or autocast's. The gradient of the matrix is summed over chunks in the
    matrix's own dtype, in a tensor that lives until the backward pass. In bfloat16 each chunk's product, itself summed
    in float32, is rounded as it is added: over n chunks a relative error of 1.1e-3 · √(n + 2), which is 2e-3 for one
    product over all rows, 3e-3 for 5 chunks and 6e-3 for 32. A sum in float32 would take twice the memory.

    In float16 that sum is float32: what no loss scale has made smaller yet may be beyond its range. Nor does it hold
    probabilities over a large count, so that there the division by `count` is left to the backward pass, where losses
    are scaled. In bfloat16 it is not: the factor that 16-bit gradients meet in a backward pass is rounded to 16 bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        count: Tensor | float,
        after: After,
    ) -> Tensor:
        """`rows [rows, width]`, `matrix [classes, width]`, `bias [classes]`, `targets [rows]`, `weights [rows]`."""
        dtype = _dtype_of_products(rows)
        precise = torch.promote_types(dtype, torch.float32)
        scale = torch.ones(len(targets), dtype=precise, device=rows.device) if weights is None else weights.to(precise)
        now, ctx.divisor = (1.0, count) if dtype is torch.float16 else (count, 1.0)
        scale = scale / now
        wanted = ctx.needs_input_grad
        made = Gradients(
            rows=torch.empty_like(rows, dtype=dtype) if wanted[0] else None,
            matrix=torch.zeros_like(matrix, dtype=_dtype_of_sums(matrix)) if wanted[1] else None,
            bias=torch.zeros_like(bias, dtype=precise) if bias is not None and wanted[2] else None,
        )
        ctx.made, ctx.dtypes = made, (rows.dtype, matrix.dtype, None if bias is None else bias.dtype)
        if bias is not None:
            bias = bias.to(dtype)
        return in_chunks(rows.to(dtype), matrix.to(dtype), bias, targets, scale, after, made) / ctx.divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows, matrix and bias, where wanted; they were made in the forward pass."""
        if ctx.made is None:
            raise RuntimeError("a fused loss has one backward pass, which scales the gradients in place")
        # Let go of, so that autograd can make a parameter's gradient of a sum without a copy.
        made, ctx.made = ctx.made, None
        factor, given = grad / ctx.divisor, zip(made, ctx.dtypes, strict=True)
        scaled = [None if gradient is None else gradient.mul_(factor).to(dtype) for gradient, dtype in given]
        return (*scaled, None, None, None, None)


class Gradients(NamedTuple):
    """Sums over the chunks so far, `[rows, width]`, `[classes, width]` and `[classes]`; None where not wanted."""

    rows: Tensor | None
    matrix: Tensor | None
    bias: Tensor | None


def in_chunks(
    rows: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor, after: After, made: Gradients
) -> Tensor:
    """Σ scale · cross-entropy over all rows; adds the gradients to those made so far."""
    # Chunks are views of these, so that the last one needs the same memory: what products give, and room for logits as
    # wide as the loss is.
    products = rows.new_empty(min(len(rows), CHUNK_ROWS), len(matrix))
    row = products[None, :1]
    follows = None if after(row) is row else after
    in_place = follows is None and rows.dtype == scale.dtype
    room = products if in_place else torch.empty_like(products, dtype=scale.dtype)
    total = scale.new_zeros(())
    for start in range(0, len(rows), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        own = rows[part]
        logits = products[: len(own)]
        wide = logits if in_place else room[: len(own)]
        if bias is None:
            torch.mm(own, matrix.T, out=logits)
        else:
            torch.addmm(bias, own, matrix.T, out=logits)
        total += _turn(logits, wide, targets[part], scale[part], follows)
        if made.rows is not None:
            torch.mm(logits, matrix, out=made.rows[part])
        if made.matrix is not None:
            _add_product(made.matrix, logits, own, wide)
        if made.bias is not None:
            made.bias.add_(logits.sum(0, dtype=made.bias.dtype))
    return total


def _turn(raw: Tensor, wide: Tensor, targets: Tensor, scale: Tensor, after: After | None) -> Tensor:
    """Σ scale · cross-entropy; makes of what the head gives `[part, classes]` its gradient, in place.

    Args:
        raw: what the head gives.
        wide: room for the same in the loss's dtype, or the same tensor.
        targets: int64 `[part]`.
        scale: `[part]`.
        after: what makes logits of it, if anything does.
    """
    if after is None:
        loss = _to_gradient(wide.copy_(raw), targets, scale)
        raw.copy_(wide)
        return loss
    with torch.enable_grad():
        leaf = raw.detach()[None].requires_grad_()
        logits = after(leaf)
    loss = _to_gradient(wide.copy_(logits[0].detach()), targets, scale)
    (gradient,) = torch.autograd.grad(logits, leaf, wide[None].to(logits.dtype))
    raw.copy_(gradient[0])
    return loss


def _to_gradient(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Σ scale · cross-entropy; makes of logits `[part, classes]` their gradient, in place."""
    targets, scale = targets[:, None], scale[:, None]
    logits.sub_(logits.amax(-1, keepdim=True))
    of_targets = logits.gather(-1, targets)
    sums = logits.exp_().sum(-1, keepdim=True)
    logits.mul_(scale / sums).scatter_add_(-1, targets, -scale)
    return ((sums.log() - of_targets) * scale).sum()


def _add_product(total: Tensor, gradient: Tensor, rows: Tensor, wide: Tensor) -> None:
    """`total += gradientᵀ @ rows`, whose factors may have fewer bits; `wide` is room for the first one with as many."""
    if total.dtype == rows.dtype:
        torch.addmm(total, gradient.T, rows, out=total)
    elif total.is_cuda:
        torch.addmm(total, gradient.T, rows, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, wide.copy_(gradient).T, rows.to(total.dtype), out=total)


def _dtype_of_products(rows: Tensor) -> torch.dtype:
    """As a linear layer has it under autocast."""
    device = rows.device.type
    casts = torch.is_autocast_enabled(device) and rows.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else rows.dtype


def _dtype_of_sums(matrix: Tensor) -> torch.dtype:
    """See `FusedCrossEntropy`."""
    return torch.float32 if matrix.dtype == torch.float16 else matrix.dtype
