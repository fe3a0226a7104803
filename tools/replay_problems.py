"""Problems for the replay's attention kernels, and dense attention in float64 to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.retention.attention.replay_kernels import attend, attend_backward

Interval = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Problem:
    """Which tokens are selected and what they see.

    Attributes:
        tokens: length of a sequence.
        position: int32 `[batch, slots]`, -1 in fillers.
        first: int32 `[batch, slots]`, the first key that each slot sees.
        last: int32 `[batch, slots]`, the last one.
    """

    tokens: int
    position: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, tokens: int, rows: Sequence[Tensor], interval: Interval) -> Problem:
        """From the positions of each sequence; `interval(sequence, position)` says what a token sees."""
        position = torch.stack(list(rows))
        seen = [[interval(b, p) if p >= 0 else (1, 0) for p in row] for b, row in enumerate(position.tolist())]
        bounds = torch.tensor(seen, dtype=torch.int32)
        return cls(tokens, position.int(), bounds[..., 0].contiguous(), bounds[..., 1].contiguous())

    def to(self, device: str) -> Problem:
        """On a device."""
        return Problem(self.tokens, *(tensor.to(device) for tensor in (self.position, self.first, self.last)))


def scattered(tokens: int, slots: int, *, fillers: int = 0, seed: int = 0) -> Tensor:
    """Sorted positions without repetition, then fillers."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(tokens, generator=generator)[: slots - fillers].sort().values
    return torch.cat([chosen, torch.full((fillers,), -1)])


def causal(sequence: int, position: int) -> tuple[int, int]:
    """All keys up to one's own."""
    return 0, position


def window(length: int) -> Interval:
    """The last `length` keys, one's own among them."""
    return lambda _, position: (max(0, position - length + 1), position)


def packed(*starts: int) -> Interval:
    """Causal within documents that start there."""
    return lambda _, position: (max(start for start in starts if start <= position), position)


def padded(*lengths: int) -> Interval:
    """All keys of sequences of these lengths."""
    return lambda sequence, _: (0, lengths[sequence] - 1)


KINDS = {
    "causal": Problem.of(100, [scattered(100, 40)], causal),
    "fillers": Problem.of(70, [scattered(70, 24, fillers=15), scattered(70, 24)], causal),
    "nothing selected": Problem.of(70, [scattered(70, 24, fillers=24), scattered(70, 24)], causal),
    "whole sequence": Problem.of(70, [torch.arange(70)], causal),
    "suffix": Problem.of(130, [torch.arange(98, 130)], causal),
    "sliding window": Problem.of(150, [scattered(150, 60)], window(70)),
    "packed documents": Problem.of(130, [scattered(130, 50)], packed(0, 11, 50, 64, 115)),
    "bidirectional": Problem.of(100, [scattered(80, 35), scattered(37, 35, fillers=10)], padded(80, 37)),
}
"""Small ones, of every kind of interval and selection."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem as the kernels take them; `exact` are keys and values in the query's type."""

    query: Tensor
    grad: Tensor
    matrices: list[Tensor]
    exact: list[Tensor]
    selected: list[Tensor]
    options: dict[str, Any]

    @classmethod
    def draw(
        cls,
        problem: Problem,
        *,
        heads: int = 1,
        kv_heads: int = 1,
        size: int = 64,
        value_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        softcap: float | None = None,
        int8: bool = False,
        spread: float = 1.0,
    ) -> Inputs:
        """Normally distributed with this spread, strided as a model's projections are."""
        generator = torch.Generator().manual_seed(0)
        (batch, slots), device = problem.position.shape, problem.position.device

        def normal(*shape: int) -> Tensor:
            return (spread * torch.randn(*shape, generator=generator)).to(device)

        sizes = size, value_size or size
        query, grad = (normal(batch, slots, heads, width).to(dtype).transpose(1, 2) for width in sizes)
        matrices = [normal(batch, kv_heads, problem.tokens, width) for width in sizes]
        scales: list[Tensor | None] = [None, None]
        if int8:
            scales = [matrix.abs().amax(-1, keepdim=True) / 127 for matrix in matrices]
            matrices = [(m / s).round().to(torch.int8) for m, s in zip(matrices, scales, strict=True)]
            exact = [(m * s).to(dtype) for m, s in zip(matrices, scales, strict=True)]
        else:
            exact = matrices = [matrix.to(dtype) for matrix in matrices]
        selected = [take(matrix, problem.position) for matrix in exact]
        options = {"scale": size**-0.5, "softcap": softcap, "key_scale": scales[0], "value_scale": scales[1]}
        return cls(query, grad, matrices, exact, selected, options)

    def backward(
        self, problem: Problem, output: Tensor, lse: Tensor, grad: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The kernels' gradients."""
        grad = self.grad if grad is None else grad
        intervals = problem.first, problem.last
        rows = *self.selected, problem.position
        return attend_backward(grad, self.query, *self.matrices, output, lse, *intervals, *rows, **self.options)


@dataclass(frozen=True)
class Results:
    """What attention and its backward pass return."""

    output: Tensor
    lse: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor

    def errors(self, expected: Results) -> dict[str, float]:
        """Largest error over largest magnitude of each result, over what is finite in the expected one."""
        errors = {}
        for name, right in vars(expected).items():
            finite = right.isfinite()
            difference = (getattr(self, name).double() - right)[finite].abs()
            magnitude = right[finite].abs()
            errors[name] = (difference.max() / magnitude.max().clamp(min=1e-30)).item() if finite.any() else 0.0
        return errors


def by_kernels(problem: Problem, inputs: Inputs) -> Results:
    """Results of the kernels."""
    output, lse = attend(inputs.query, *inputs.matrices, problem.first, problem.last, **inputs.options)
    return Results(output, lse, *inputs.backward(problem, output, lse))


def dense(problem: Problem, inputs: Inputs) -> Results:
    """Results of autograd on all scores, in float64."""
    query, grad, *matrices = (tensor.double() for tensor in (inputs.query, inputs.grad, *inputs.exact))
    query.requires_grad_()
    rows = [take(matrix, problem.position).requires_grad_() for matrix in matrices]
    full = []
    for matrix, selected in zip(matrices, rows, strict=True):
        matrix = matrix.clone()
        for b, slots in enumerate(problem.position >= 0):
            matrix[b, :, problem.position[b, slots].long()] = selected[b][:, slots]
        full.append(matrix.repeat_interleave(query.shape[1] // matrix.shape[1], 1))
    scores = inputs.options["scale"] * query @ full[0].mT
    softcap = inputs.options["softcap"]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(problem.tokens, device=query.device)
    seen = (problem.first[..., None] <= positions) & (positions <= problem.last[..., None])
    sees = seen.any(-1)[:, None, :, None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    output = torch.where(sees, torch.where(sees, scores, 0.0).softmax(-1), 0.0) @ full[1]
    return Results(output.detach(), scores.detach().logsumexp(-1), *torch.autograd.grad(output, [query, *rows], grad))


def take(matrix: Tensor, position: Tensor) -> Tensor:
    """Rows of `[batch, kv_heads, tokens, size]` at positions `[batch, slots]`, with some row in fillers."""
    index = position.clamp(min=0).long()[:, None, :, None]
    return matrix.gather(2, index.expand(-1, matrix.shape[1], -1, matrix.shape[-1]))
