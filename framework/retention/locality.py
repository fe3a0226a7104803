"""Does a block mix tokens only where the replay can follow?

A replay sees selected rows alone, and meets the others only in the attention function. A block that mixes tokens
elsewhere (state space, convolution, linear attention, relative positions inside the attention) would get silently
wrong gradients. So each block is tried once on its first input: its replay must reproduce its record pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lily import LilyLayer
from torch import Tensor

from framework.retention.block import block_of, first_output, selective_call
from framework.retention.randomness import generator_states
from framework.retention.rows import SelectedRows
from framework.selection import Selection


@dataclass(frozen=True)
class Trial:
    """What the first run of a block showed.

    Attributes:
        reason: why it cannot be replayed on selected rows, or None if it can.
        draws: whether it draws random numbers, which a replay has to repeat.
    """

    reason: str | None
    draws: bool = False


def try_block(function: partial[Any], hidden: Tensor, others: tuple[Any, ...]) -> Trial:
    """Find out whether a block can be replayed on selected rows.

    Every second position is replayed and compared with the record pass, relative to what the block adds to its input.
    Mixing that the replay misses shows as an error of the order of 1; rounding stays below the tolerance. The trial
    leaves the random state as it was.

    Args:
        function: the block's call, with its keyword arguments.
        hidden: `[batch, tokens, width]`, its first input.
        others: its other positional arguments.
    """
    differentiable = [name for name, value in function.keywords.items() if _requires_grad(value)]
    if differentiable or _requires_grad(others):
        names = ", ".join(differentiable) or "positional"
        return Trial(f"it takes differentiable arguments besides the hidden states ({names})")
    block = block_of(function)
    if block is not None and any(isinstance(module, LilyLayer) for module in block.modules()):
        # By name, because an adapter that still is the identity mixes nothing that a trial could see.
        return Trial("its Lily adapter averages its routing over all tokens of the batch")
    batch, tokens = hidden.shape[:2]
    positions = torch.arange(1, tokens, 2, device=hidden.device).expand(batch, -1)
    if not positions.numel():
        return Trial(None, draws=True)
    selected = SelectedRows(Selection.of_positions(positions), tokens, hidden.device)
    options = {"retain_linears": False, "kv_format": "model", "random": True}
    call = selective_call(function, hidden, others, selected, name="trial", **options)
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        before = generator_states(hidden.device)
        recorded = first_output(call.record(hidden))
        after = generator_states(hidden.device)
        draws = bool(call.current.random)
        if not draws and not all(map(torch.equal, before, after)):
            return Trial("it draws random numbers in a way that a replay cannot repeat")
        if recorded.shape[:2] != (batch, tokens):
            return Trial(f"its output has shape {[*recorded.shape]} for an input of shape {[*hidden.shape]}")
        try:
            replayed = call.replay(selected.take(hidden))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            said = next(iter(str(error).splitlines()), "")
            return Trial(f"it does not run on selected rows ({type(error).__name__}: {said})")
    if call.current.attention or call.current.random:
        return Trial("it attends or draws random numbers a varying number of times")
    expected = selected.take(recorded)
    if replayed.shape != expected.shape:
        return Trial(f"its replay has shape {[*replayed.shape]} instead of {[*expected.shape]}")
    error = _relative_error(replayed, expected, selected.take(hidden))
    mixes = None if error is None else f"it mixes tokens outside the attention interface (error {error:.1e})"
    return Trial(mixes, draws)


def _relative_error(replayed: Tensor, expected: Tensor, rows: Tensor) -> float | None:
    """The median error of a row relative to the block's update, if it is above what rounding explains."""
    precision = torch.finfo(expected.dtype).eps
    if torch.is_autocast_enabled(expected.device.type) and expected.dtype is not torch.float64:
        precision = max(precision, torch.finfo(torch.get_autocast_dtype(expected.device.type)).eps)
    replayed, expected, rows = replayed.double(), expected.double(), rows.double()
    update = (expected - rows).norm(dim=-1) if rows.shape == expected.shape else expected.norm(dim=-1)
    update = update.clamp(min=torch.finfo(torch.float32).tiny)
    error = (replayed - expected).norm(dim=-1) / update
    tolerance = 16 * precision * (1 + expected.norm(dim=-1) / update) + 1e-4
    excess = (error / tolerance).nan_to_num(0.0)
    return float(error.nan_to_num(0.0).max()) if float(excess.quantile(0.5)) > 1 else None


def _requires_grad(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_requires_grad(v) for v in value)
    return torch.is_tensor(value) and value.requires_grad
