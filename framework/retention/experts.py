"""Retained experts: a replay that multiplies no matrix of experts which are stacked in one tensor.

transformers sorts the pairs of a token and one of its experts by expert, and multiplies each run of pairs with its
expert's matrix in one operator (`grouped_mm_experts_forward` in transformers.integrations.moe). That operator is met on
its way: in the record pass its results are kept for the pairs of selected tokens, in the order of tokens; in the replay
it returns them in the order of that sort.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from framework.retention.block_pass import Phase, RetainedExperts, current_pass

GROUPED = "grouped_mm"
"""The implementation that is known here; what others compute is recomputed."""

MATRICES = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the stacked matrices, in the order of their products; experts have no gate, or no other one."""


class KnownGrouped(torch.autograd.Function):
    """A grouped product `x [pairs, in] @ weight [experts, in, out]` whose result is known.

    dX = dY·Wᵀ and dW = Xᵀ·dY by groups, as torch's own.
    """

    @staticmethod
    def forward(ctx: Any, output: list[Tensor], ends: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The only element of `output [pairs, out]`; `ends [experts]` are those of the groups."""
        (known,) = output
        needs_x, needs_weight = ctx.needs_input_grad[2:]
        ctx.save_for_backward(ends, x if needs_weight else None, weight if needs_x else None)
        return known

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        """Gradients of the input and the matrices, where wanted."""
        ends, x, weight = ctx.saved_tensors
        # The gradient of what is summed up over experts comes expanded.
        grad = grad.contiguous()
        grad_x = None if weight is None else torch._grouped_mm(grad, weight.transpose(-2, -1), offs=ends)
        grad_weight = None if x is None else torch._grouped_mm(x.transpose(-2, -1), grad, offs=ends)
        return None, None, grad_x, grad_weight


class _Products(TorchFunctionMode):
    """Sees the sort and the grouped products of a call of experts; the first of these is given its order."""

    def __init__(self) -> None:
        super().__init__()
        self._order: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._grouped_mm and self._order is not None:
            return self.product(self._order, lambda: func(*args, **kwargs), *args[:2], kwargs["offs"])
        result = func(*args, **kwargs)
        if func is torch.sort and self._order is None:
            self._order = result[1]
        return result

    def product(self, order: Tensor, compute: Callable[[], Tensor], x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """A grouped product, of pairs that stand in an order: pair i is the `order[i]`-th by tokens."""
        # Each of the two passes has its own; torch's mode has no abstract methods.
        raise NotImplementedError


class RecordedProducts(_Products):
    """Keeps products' rows of selected tokens.

    Args:
        kept: takes them.
        chosen: of each product in turn, whether its rows are kept.
        tokens: indices of the selected tokens among all of the batch.
    """

    def __init__(self, kept: RetainedExperts, chosen: list[bool], tokens: Tensor) -> None:
        super().__init__()
        self._kept, self._chosen, self._tokens = kept, chosen, tokens

    def product(self, order: Tensor, compute: Callable[[], Tensor], x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """The product."""
        output, count = compute(), self._kept.experts.shape[1]
        rows = None
        if self._chosen[len(self._kept.outputs)]:
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order), device=order.device)
            rows = output[place.view(-1, count)[self._tokens]]
        self._kept.outputs.append(rows)
        return output


class ReplayedProducts(_Products):
    """Returns what was kept of products, and computes the others."""

    def __init__(self, kept: RetainedExperts) -> None:
        super().__init__()
        self._kept = kept

    def product(self, order: Tensor, compute: Callable[[], Tensor], x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """The product."""
        rows = self._kept.outputs.pop(0)
        if rows is None:
            return compute()
        return KnownGrouped.apply([rows.flatten(0, 1)[order]], ends, x, weight)


class _RetainingExperts:
    """What experts whose products are retained have in front of their own class.

    Attributes:
        retained: names of the matrices.
    """

    retained: frozenset[str]

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states [tokens, width]`; of each token its experts and their weights `[tokens, experts of a token]`.

        A replay sends a row to the experts that the record pass sent it to: the others' products are not known.
        """
        current, plain = current_pass(), super().forward
        if current is None or not current.retain_linears or not is_stacked(self):
            return plain(hidden_states, top_k_index, top_k_weights)
        rows, calls = current.rows, current.experts[self]
        if current.phase is Phase.RECORD:
            kept = None
            if len(hidden_states) == rows.batch * rows.tokens:
                kept = RetainedExperts(top_k_index[rows.token])
            calls.append(kept)
            if kept is None:
                return plain(hidden_states, top_k_index, top_k_weights)
            chosen = [name in self.retained for name in matrices_of(self)]
            with RecordedProducts(kept, chosen, rows.token):
                return plain(hidden_states, top_k_index, top_k_weights)
        kept = calls.popleft()
        if kept is None or len(hidden_states) != len(kept.experts):
            return plain(hidden_states, top_k_index, top_k_weights)
        with ReplayedProducts(kept):
            return plain(hidden_states, kept.experts, top_k_weights)


@cache
def _retaining(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Retaining{plain.__name__}", (_RetainingExperts, plain), {"__module__": __name__})


def retain_experts(module: nn.Module, names: Collection[str]) -> None:
    """Let experts keep the results of products with some of their matrices."""
    module.__class__ = _retaining(type(module))
    module.retained = frozenset(names)


def release_experts(module: nn.Module) -> None:
    """Undo `retain_experts`."""
    if isinstance(module, _RetainingExperts):
        module.__class__ = type(module).__bases__[1]
        del module.retained


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is experts that are multiplied by `GROUPED`."""
    stacked = all(getattr(module, name, None) is not None for name in ("config", "down_proj", "has_gate"))
    return stacked and module.down_proj.dim() == 3 and module.config._experts_implementation == GROUPED


def matrices_of(module: nn.Module) -> list[str]:
    """Names of the stacked matrices of experts, in the order of their products."""
    return [name for name in MATRICES if isinstance(getattr(module, name, None), nn.Parameter)]
