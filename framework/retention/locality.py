"""Does a block mix tokens only where the replay can follow?

A replay sees selected rows alone, and meets the others only in the attention function. A block that mixes tokens
elsewhere (state space, convolution, linear attention, relative positions inside the attention) would get silently
wrong gradients. So each block is tried once on its first input: its replay must reproduce its record pass. Of a block
that hands a state on from token to token the replay is one of neighbouring rows, from the state before them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lily import LilyLayer
from torch import Tensor, nn

from framework.retention import recurrent
from framework.retention.block import BlockCall, block_of, first_output, selective_call
from framework.retention.randomness import generator_states
from framework.retention.rows import SelectedRows
from framework.retention.runs import RunRows
from framework.selection import Selection

# What code raises that gets tensors of another shape, or a cache that does less than transformers' own.
_NOT_RUNNING = (RuntimeError, ValueError, TypeError, IndexError, LookupError, AssertionError, AttributeError)


@dataclass(frozen=True)
class Trial:
    """What the first run of a block showed.

    Attributes:
        reason: why it cannot be replayed on selected rows, or None if it can.
        draws: whether it draws random numbers, which a replay has to repeat.
        mixers: modules inside the block that have to start from their state in a replay of neighbouring rows, by name,
            with the number of their state updates in a pass; without any it can be replayed on any rows.
    """

    reason: str | None
    draws: bool = False
    mixers: dict[str, int] = field(default_factory=dict)


def try_block(function: partial[Any], hidden: Tensor, others: tuple[Any, ...], runs: bool = False) -> Trial:
    """Find out whether a block can be replayed on selected rows.

    Every second position is replayed and compared with the record pass, relative to what the block adds to its input.
    Mixing that the replay misses shows as an error of the order of 1; rounding stays below the tolerance. The trial
    leaves the random state as it was.

    Args:
        function: the block's call, with its keyword arguments.
        hidden: `[batch, tokens, width]`, its first input.
        others: its other positional arguments.
        runs: neighbouring rows will do. Then a block whose mixers hand on a state may be replayed from it; the mixers
            are left as they were, `recurrent.install` is the caller's.
    """
    differentiable = [name for name, value in function.keywords.items() if _requires_grad(value)]
    if differentiable or _requires_grad(others):
        names = ", ".join(differentiable) or "positional"
        return Trial(f"it takes differentiable arguments besides the hidden states ({names})")
    block = block_of(function)
    if block is not None and any(isinstance(module, LilyLayer) for module in block.modules()):
        # By name, because an adapter that still is the identity mixes nothing that a trial could see.
        return Trial("its Lily adapter averages its routing over all tokens of the batch")
    mixers = [] if block is None else recurrent.mixers_of(block)
    if mixers:
        state = f"its {', '.join(mixers)} hands a state on from token to token"
        if not runs:
            return Trial(f"{state}, and the strategy selects tokens that are no neighbours")
        trial = _try_runs(block, mixers, function, hidden, others)
        return trial if trial.reason is None else replace(trial, reason=f"{state}; from its state, {trial.reason}")
    batch, tokens = hidden.shape[:2]
    positions = torch.arange(1, tokens, 2, device=hidden.device).expand(batch, -1)
    if not positions.numel():
        return Trial(None, draws=True)
    return _try_rows(function, hidden, others, SelectedRows(Selection.of_positions(positions), tokens, hidden.device))


def _try_runs(
    block: nn.Module, mixers: list[str], function: partial[Any], hidden: Tensor, others: tuple[Any, ...]
) -> Trial:
    """Replay the second half of every sequence from the state before it.

    The halves are of different lengths, so that all that there is to pad is padded. A block whose error is small may
    owe it to a state of little weight, so mixers are compared by themselves, too, in every row.
    """
    precision = _precision(hidden)
    rows = RunRows(SelectedRows(_second_halves(hidden), hidden.shape[1], hidden.device), slack=3)
    recurrent.install(block, dict.fromkeys(mixers))
    try:
        with _compared(block, mixers, rows) as errors:
            trial = _try_rows(function, hidden, others, rows, precision)
        updates = {name: block.get_submodule(name).state_updates for name in mixers}
    except _NOT_RUNNING as error:
        return Trial(_not_running(error))
    finally:
        recurrent.remove(block)
    if trial.reason is not None:
        return trial
    if max(errors, default=0.0) > 16 * precision + 1e-4:
        return replace(trial, reason=f"it is off by {max(errors):.1e}")
    return replace(trial, mixers=updates)


def _precision(hidden: Tensor) -> float:
    """Of what a block computes; autocast leaves float64 as it is."""
    kind = hidden.device.type
    dtypes = [hidden.dtype, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _second_halves(hidden: Tensor) -> Selection:
    """A run in the second half of every sequence, one token shorter at both ends in every other one."""
    batch, tokens = hidden.shape[:2]
    shorter = torch.arange(batch, device=hidden.device)[:, None] % 2
    first = (tokens // 2 + shorter).clamp(max=tokens - 1)
    last = torch.maximum(first, tokens - 1 - shorter)
    position = torch.arange(tokens, device=hidden.device)
    return Selection.of_mask((first <= position) & (position <= last), torch.ones(batch, tokens, device=hidden.device))


@contextmanager
def _compared(block: nn.Module, names: list[str], rows: RunRows) -> Iterator[list[float]]:
    """Within this context the outputs of modules in a replay are compared with those in the record pass before it.

    The list that it gives gets the largest error of a row of each, relative to the row or to the mean of the rows,
    whichever is larger.
    """
    recorded: defaultdict[nn.Module, list[Tensor]] = defaultdict(list)
    errors: list[float] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found = first_output(output)
        if found.shape[:2] == (rows.batch, rows.tokens):
            recorded[module].append(rows.take(found).double())
        elif recorded[module]:
            expected = recorded[module].pop(0)
            size = expected.norm(dim=-1)
            size = size.clamp(min=float(size.mean())).clamp_(min=torch.finfo(torch.float32).tiny)
            errors.append(float(((found.double() - expected).norm(dim=-1) / size).max()))

    handles = [block.get_submodule(name).register_forward_hook(note) for name in names]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


def _try_rows(
    function: partial[Any],
    hidden: Tensor,
    others: tuple[Any, ...],
    selected: SelectedRows,
    precision: float | None = None,
) -> Trial:
    """Compare a replay of some rows with the record pass; `precision` is the output's own by default."""
    options = {"retain_linears": False, "kv_format": "model", "random": True}
    call = selective_call(function, hidden, others, selected, name="trial", **options)
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        return _compare(call, hidden, selected, precision)


def _compare(call: BlockCall, hidden: Tensor, selected: SelectedRows, precision: float | None) -> Trial:
    before = generator_states(hidden.device)
    recorded = first_output(call.record(hidden))
    after = generator_states(hidden.device)
    draws = bool(call.current.random)
    if not draws and not all(map(torch.equal, before, after)):
        return Trial("it draws random numbers in a way that a replay cannot repeat")
    if recorded.shape[:2] != hidden.shape[:2]:
        return Trial(f"its output has shape {[*recorded.shape]} for an input of shape {[*hidden.shape]}")
    try:
        replayed = call.replay(selected.take(hidden))
    except _NOT_RUNNING as error:
        return Trial(_not_running(error))
    if call.current.attention or call.current.random:
        return Trial("it attends or draws random numbers a varying number of times")
    expected = selected.take(recorded)
    if replayed.shape != expected.shape:
        return Trial(f"its replay has shape {[*replayed.shape]} instead of {[*expected.shape]}")
    precision = max(precision or _precision(expected), call.current.precision)
    error = _relative_error(replayed, expected, selected.take(hidden), precision)
    mixes = None if error is None else f"it mixes tokens outside the attention interface (error {error:.1e})"
    return Trial(mixes, draws)


def _not_running(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    said = next(iter(str(error).splitlines()), "")
    return f"it does not run on selected rows ({type(error).__name__}: {said})"


def _relative_error(replayed: Tensor, expected: Tensor, rows: Tensor, precision: float) -> float | None:
    """The median error of a row relative to the block's update, if it is above what rounding explains."""
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
