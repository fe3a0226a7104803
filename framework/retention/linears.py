"""Retained linears: a replay that recomputes no large matrix product.

In the record pass each linear inside a block keeps its output's selected rows. In the replay it returns them through
a function whose backward is the linear's own, so that a replay costs norms, activations and attention only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from framework.linear_names import check_names, retains
from framework.retention.block_pass import BlockPass, Phase, current_pass
from framework.retention.experts import is_stacked, matrices_of, release_experts, retain_experts


class KnownOutput(torch.autograd.Function):
    """`x @ weight + bias` whose result is known; `weight [in, out]` is a view of the parameter for `nn.Linear`.

    dX = dY·Wᵀ, dW = Xᵀ·dY, db = Σ dY, computed in the output's dtype, as autocast does.
    """

    @staticmethod
    def forward(
        ctx: Any, output: list[Tensor], transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The only element of `output`; `transposed` says that the weight is stored `[out, in]`."""
        (known,) = output
        needs_x, needs_weight = ctx.needs_input_grad[2:4]
        ctx.transposed, ctx.x_dtype, ctx.bias_dtype = transposed, x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x.to(known.dtype) if needs_weight else None, weight if needs_x or needs_weight else None)
        return known

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the input, the weight and the bias, where wanted."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[2:5]
        flat = grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            matrix = weight.to(grad.dtype)
            grad_x = (grad @ (matrix if ctx.transposed else matrix.T)).to(ctx.x_dtype)
            # Under autocast a copy, which need not be there beside the weight's gradient.
            del matrix
        if needs_weight:
            rows = x.flatten(0, -2)
            grad_weight = (flat.T @ rows if ctx.transposed else rows.T @ flat).to(weight.dtype)
        if needs_bias:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return None, None, grad_x, grad_weight, grad_bias


class PackedProduct(torch.autograd.Function):
    """`x @ matrixᵀ + bias` of a `PackedLinear`: dX = dY·matrix, db = Σ dY, computed in the output's dtype.

    It keeps the layer and neither its input nor its matrix, which is made again in the backward pass out of what the
    layer's parameters hold by then: what sharding engines gather for a moment can be freed in between.
    """

    @staticmethod
    def forward(ctx: Any, known: Sequence[Tensor], layer: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        """The only element of `known`, or the product if there is none."""
        ctx.layer, ctx.x_dtype, ctx.bias_dtype = layer, x.dtype, None if bias is None else bias.dtype
        if known:
            (output,) = known
            return output
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return functional.linear(x, layer.matrix(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        """Gradients of the input and the bias, where wanted."""
        grad_x = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_x = (grad @ ctx.layer.matrix(grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return None, None, grad_x, grad_bias


def _through_pass(
    current: BlockPass,
    module: nn.Module,
    x: Tensor,
    compute: Callable[[Tensor], Tensor],
    return_known: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """Keep the output's selected rows, or return the kept ones with the gradient of what they were computed from.

    Calls whose rows are not the batch's tokens (experts with routed tokens, adapters that send a weight through a
    linear) are recomputed in the replay.
    """
    kept = current.linears[module]
    if current.phase is Phase.RECORD:
        output, rows = compute(x), current.rows
        is_tokens = output.numel() == rows.batch * rows.tokens * output.shape[-1]
        kept.append(rows.take(output.view(rows.batch, rows.tokens, -1)) if is_tokens else None)
        return output
    known = kept.popleft()
    known = None if known is None else current.as_seen(known)
    if known is None or known.shape[:-1].numel() != x.shape[:-1].numel():
        return compute(x)
    # Detached: as a view it could not be changed in place, which adapters do with their base layer's output.
    output = known.view(*x.shape[:-1], known.shape[-1]).detach()
    return return_known([output])


class PackedLinear(nn.Linear):
    """A linear layer whose frozen matrix is held in a form of its own, such as codes of 4 bits.

    Its `weight` is what holds that form.

    Attributes:
        retained: whether it keeps its output's selected rows while a block is recorded that retains linears.
    """

    retained = False

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix `[out_features, in_features]`, made anew by every call."""
        # Each form has its own; `ABC` would need another metaclass than other linear layers have.
        raise NotImplementedError

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in_features]` to `[..., out_features]`."""
        current = current_pass()
        if current is None or not current.retain_linears or not self.retained:
            return self._product(input)
        return _through_pass(current, self, input, self._product, lambda known: self._product(input, known))

    def _product(self, x: Tensor, known: Sequence[Tensor] = ()) -> Tensor:
        return PackedProduct.apply(known, self, x, self.bias)


class RetainedLinear(nn.Linear):
    """`nn.Linear` that keeps its output's selected rows while a block is recorded."""

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in_features]` to `[..., out_features]`."""
        current = current_pass()
        if current is None or not current.retain_linears:
            return super().forward(input)
        return _through_pass(
            current,
            self,
            input,
            super().forward,
            lambda known: KnownOutput.apply(known, True, input, self.weight, self.bias),
        )


class RetainedConv1D(Conv1D):
    """GPT-2's linear, with the weight stored `[in, out]`, that keeps its output's selected rows."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        current = current_pass()
        if current is None or not current.retain_linears:
            return super().forward(x)
        return _through_pass(
            current, self, x, super().forward, lambda known: KnownOutput.apply(known, False, x, self.weight, self.bias)
        )


RETAINED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RetainedLinear, Conv1D: RetainedConv1D}
PLAIN_CLASSES = {retained: plain for plain, retained in RETAINED_CLASSES.items()}


def linear_paths(block: nn.Module) -> dict[nn.Module, str]:
    """The linear layers inside a block whose outputs can be kept, with their paths (see `framework.linear_names`).

    Paths are those of the model without its adapter: `self_attn.q_proj` is the layer that an adapter is put on, and
    `self_attn.q_proj.lora_A` a matrix of the adapter, whatever it is called.
    """
    kinds = (*RETAINED_CLASSES, *PLAIN_CLASSES)
    return {
        module: path for module, path in _paths(block, ()) if type(module) in kinds or isinstance(module, PackedLinear)
    }


def expert_paths(block: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The stacked matrices of experts whose products can be kept, by path: the experts and the matrix's name there."""
    return {
        f"{path}.{name}": (module, name)
        for module, path in _paths(block, ())
        if is_stacked(module)
        for name in matrices_of(module)
    }


def _paths(module: nn.Module, path: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    yield module, ".".join(path)
    for name, child in module.named_children():
        # PEFT wraps a layer under this name, and has its matrices by the names of adapters.
        own = name == "base_layer" or isinstance(module, nn.ModuleDict)
        yield from _paths(child, path if own else (*path, name))


def check_retained(blocks: Iterable[nn.Module], chosen: bool | Collection[str]) -> None:
    """Make sure that there is a linear layer of every chosen name.

    Raises:
        UserError: a block has none that is called so, nor has another one.
    """
    check_names(chosen, [path for block in blocks for path in (*linear_paths(block).values(), *expert_paths(block))])


def retain_linears(block: nn.Module, chosen: bool | Collection[str] = True) -> None:
    """Let linear layers inside a block, and stacked experts, keep their outputs; those of other classes do not.

    Args:
        block: changed in place.
        chosen: which, as in the config's `retention.retain_linears`.
    """
    for module, path in linear_paths(block).items():
        if retains(chosen, path):
            if isinstance(module, PackedLinear):
                module.retained = True
            module.__class__ = RETAINED_CLASSES.get(type(module), type(module))
    experts: dict[nn.Module, list[str]] = {}
    for path, (module, name) in expert_paths(block).items():
        if retains(chosen, path):
            experts.setdefault(module, []).append(name)
    for module, names in experts.items():
        retain_experts(module, names)


def release_linears(block: nn.Module) -> None:
    """Undo `retain_linears`."""
    for module in block.modules():
        if isinstance(module, PackedLinear):
            module.retained = False
        release_experts(module)
        module.__class__ = PLAIN_CLASSES.get(type(module), type(module))
