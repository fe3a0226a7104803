"""Blocks through torch.compile, in their record passes, replays and recomputations.

What cannot be traced is left out of the graphs and runs as it is (`torch.compiler.disable`): attention, and layers that
keep something from one pass to the other. What lies between is compiled: norms, position embeddings, activations,
residual connections, and products whose outputs are not retained. All sizes but the widths of the model are dynamic,
so that no batch is compiled for again that has another length or another number of selected tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from transformers import PreTrainedModel

from framework.retention.blocks import blocks_of

BACKEND = "inductor"
"""Of `torch.compile`."""


@cache
def _compiled_forward(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A class's forward, compiled once for all blocks of the class."""
    compiled: Callable[..., Any] = torch.compile(forward, backend=backend, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        # A length that is a width of the model by chance (4096 tokens, hidden 4096) is no constant for that.
        with symbolic_shapes.patch(use_duck_shape=False):
            return compiled(*args, **kwargs)

    return call


def compiled(function: partial[Any]) -> partial[Any]:
    """A block's call, as it hands it to its checkpointing function, with the block's forward compiled.

    Hooks of the block (FSDP2's) stay outside: they cannot be traced.
    """
    if inspect.ismethod(function.func):
        # transformers before 5.23 hands over the block's `__call__`, which runs the hooks and then the forward.
        return partial(_call_compiled, function.func, **function.keywords)
    return partial(_compiled_forward(function.func, BACKEND), *function.args, **function.keywords)


def _call_compiled(call: MethodType, *args: Any, **kwargs: Any) -> Any:
    block = call.__self__
    with _own_forward(block, MethodType(_compiled_forward(type(block).forward, BACKEND), block)):
        return call(*args, **kwargs)


@contextmanager
def _own_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context a block has a forward of its own."""
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _call(function: partial[Any], *args: Any) -> Any:
    return compiled(function)(*args)


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile the blocks of a model that is trained with policy `all`. A transform, applied after adapters.

    Blocks are reached by way of their checkpointing function, in training alone.

    Raises:
        ValueError: the model has no blocks.
    """
    blocks_of(model)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=_call)
