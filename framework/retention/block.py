"""The heart: a block's record pass, and its replay on selected rows inside the backward pass.

Transformers' blocks hand themselves to a checkpointing function; this module is one. The record pass runs the block on
all tokens without a graph and keeps what the replay needs. The replay runs the same block on the selected rows with a
graph and back-propagates through it (a nested backward, as reentrant checkpointing does), so every value computed for
an unselected token is a constant.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from framework.retention.block_pass import AllKeysFound, BlockPass, Phase
from framework.retention.host import HostStore, Kept
from framework.retention.randomness import ReplayedRandomness, generator_states, set_generator_states
from framework.retention.rows import SelectedRows

_ELSEWHERE = torch.empty(0)
"""Stands in a block's pass for a tensor that is on the host."""


@dataclass(frozen=True)
class AutocastState:
    """Autocast as it was in the forward pass. It is thread-local, and the backward pass may run in another thread.

    The cache stays off: casts made without a graph in the record pass must not be found again in the replay.
    """

    devices: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls, device_type: str) -> AutocastState:
        """The state of the CPU and of the device that the block runs on."""
        types = dict.fromkeys((device_type, "cpu"))
        return cls(tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast as captured, without its cache."""
        with contextlib.ExitStack() as stack:
            for device_type, enabled, dtype in self.devices:
                stack.enter_context(torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=False))
            yield


@dataclass
class BlockCall:
    """One call of a block: `function(hidden, *others, **keywords)` with `hidden [batch, tokens, width]`.

    Profiles show its passes under its name. What it keeps is in `store` until the replay; on the device without one.
    """

    name: str
    function: partial[Any]
    others: tuple[Any, ...]
    current: BlockPass
    random: bool
    autocast: AutocastState
    store: HostStore | None = None
    generators: list[Tensor] | None = None

    @property
    def keeps_input(self) -> bool:
        """Whether the input of all tokens is kept, from which the replay gets keys and values again."""
        return self.current.kv_format == "recompute"

    def record(self, hidden: Tensor) -> Any:
        """The block's output for all tokens, without a graph."""
        if self.keeps_input and self.random:
            self.generators = generator_states(hidden.device)
        with record_function(f"record {self.name}"), torch.no_grad(), self._pass(Phase.RECORD):
            return self.function(hidden, *self.others)

    def find_keys(self, hidden: Tensor) -> None:
        """Get keys and values of all tokens again, by a record pass that ends with the last of them."""
        kept = self.current.attention
        if not kept:
            return
        again = dataclasses.replace(self, current=BlockPass(self.current.rows, wanted=len(kept)))
        devices = [hidden.device] if hidden.is_cuda else []
        with torch.random.fork_rng(devices=devices, enabled=self.generators is not None):
            if self.generators is not None:
                set_generator_states(hidden.device, self.generators)
            with contextlib.suppress(AllKeysFound):
                again.record(hidden)
        for mine, found in zip(kept, again.current.attention, strict=True):
            mine.keys, mine.values = found.keys, found.values

    def put_away(self, given: Tensor, store: HostStore) -> Kept:
        """Give a store what is kept: of the block's input `given`, and all that the record pass has retained.

        What is on another device, such as a draw on the CPU, stays there.
        """
        tensors = [given]

        def taken(tensor: Tensor) -> Tensor:
            if tensor.device != given.device:
                return tensor
            tensors.append(tensor)
            return _ELSEWHERE

        self.current.replace(taken)
        return store.keep(tensors)

    def fetch(self, kept: Kept) -> Tensor:
        """What was kept of the block's input; the rest is in its place again."""
        given, *retained = kept.fetch()
        following = iter(retained)
        self.current.replace(lambda tensor: next(following) if tensor is _ELSEWHERE else tensor)
        return given

    def replay(self, rows: Tensor) -> Tensor:
        """The block's output for `rows [1, rows, width]`, of the same shape, with a graph if enabled."""
        take = self.current.rows.take_argument
        keywords = {name: take(value) for name, value in self.function.keywords.items()}
        others = tuple(take(value) for value in self.others)
        with record_function(f"replay {self.name}"), self._pass(Phase.REPLAY):
            return first_output(self.function.func(*self.function.args, rows, *others, **keywords))

    @contextlib.contextmanager
    def _pass(self, phase: Phase) -> Iterator[None]:
        random = ReplayedRandomness(self.current) if self.random else contextlib.nullcontext()
        with self.autocast.restored(), self.current.running(phase), random:
            yield


def first_output(output: Any) -> Tensor:
    """The hidden states among a block's outputs."""
    return output[0] if isinstance(output, tuple) else output


def map_first_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with its hidden states changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def block_of(function: Callable[..., Any]) -> nn.Module | None:
    """The block that hands itself to a checkpointing function, or None if the caller is not a block.

    transformers >= 5.23 passes `partial(forward, block, …)`, earlier ones `partial(super().__call__, …)`.
    """
    if not isinstance(function, partial):
        return None
    owner = function.args[0] if function.args else getattr(function.func, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class SelectiveBlock(torch.autograd.Function):
    """Record pass forward, replay backward."""

    @staticmethod
    def forward(ctx: Any, call: BlockCall, anchor: Tensor, hidden: Tensor, *parameters: Tensor) -> Any:
        """The block's output.

        `anchor` is an empty tensor that requires grad, so that frozen embeddings get a graph. `parameters`, if given,
        get their gradients from this node; otherwise the replay accumulates them one by one, which holds fewer bytes.
        """
        output = call.record(hidden)
        given = hidden if call.keeps_input else call.current.rows.take(hidden)
        ctx.kept = ctx.rows = saved = None
        if call.store is not None:
            ctx.kept = call.put_away(given, call.store)
        elif call.keeps_input:
            saved = given
        else:
            ctx.rows = given
        ctx.save_for_backward(saved)
        ctx.call, ctx.parameters = call, parameters
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Replay, back-propagate into the parameters, and return the gradient of the block's input."""
        if ctx.call is None:
            raise RuntimeError("a token-selective block back-propagates once: its retained tensors are gone")
        call, ctx.call = ctx.call, None
        selected, rows = call.current.rows, _kept_input(ctx, call)
        if call.keeps_input:
            hidden = rows
            call.find_keys(hidden)
            rows = selected.take(hidden)
        rows.requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad():
            output = call.replay(rows)
        grad_rows, grad_parameters = None, [None] * len(ctx.parameters)
        with record_function(f"backward {call.name}"):
            if output.requires_grad and ctx.parameters:
                wanted = [rows, *ctx.parameters] if rows.requires_grad else [*ctx.parameters]
                grads = torch.autograd.grad(output, wanted, selected.take_gradient(grad), allow_unused=True)
                grad_rows, grad_parameters = (grads[0], grads[1:]) if rows.requires_grad else (None, grads)
            elif output.requires_grad:
                torch.autograd.backward(output, selected.take_gradient(grad))
                grad_rows = rows.grad
        if not ctx.needs_input_grad[2]:
            return None, None, None, *grad_parameters
        grad_hidden = torch.zeros(*grad.shape[:2], rows.shape[-1], dtype=rows.dtype, device=rows.device)
        if grad_rows is not None:
            selected.put_gradient(grad_hidden, grad_rows)
        return None, None, grad_hidden, *grad_parameters


def _kept_input(ctx: Any, call: BlockCall) -> Tensor:
    """What `SelectiveBlock` keeps of the block's input: the selected rows, or all. It forgets it."""
    if ctx.kept is not None:
        kept, ctx.kept = ctx.kept, None
        return call.fetch(kept)
    saved: tuple[Tensor | None] = ctx.saved_tensors
    (hidden,) = saved
    rows, ctx.rows = ctx.rows, None
    return rows if hidden is None else hidden


def selective_call(
    function: partial[Any],
    hidden: Tensor,
    others: tuple[Any, ...],
    selected: SelectedRows,
    *,
    name: str,
    retain_linears: bool,
    kv_format: str,
    random: bool,
    store: HostStore | None = None,
) -> BlockCall:
    """A block's call in the current autocast state."""
    current = BlockPass(selected, kv_format=kv_format, retain_linears=retain_linears)
    return BlockCall(name, function, others, current, random, AutocastState.capture(hidden.device.type), store)
