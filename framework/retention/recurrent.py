"""Modules with a recurrent state, replayed from the state at the first selected token.

State space models, linear attention and short convolutions carry a state from token to token. Transformers' mixers of
this kind take a state and give one through the model's cache (`Cache.update_conv_state`, `update_recurrent_state`),
from which they can go on with any number of tokens. That is the seam: a mixer is handed a cache of one layer.

- *Record pass*: the mixer runs over all tokens as it always does, then once more over the tokens before the runs, up to
  the moment at which it hands its state over. What its layers gave for these tokens is known from the first time, so
  no layer is called again: convolution and scan run, projections do not.
- *Replay*: the mixer runs over the runs, each sequence from its own state, which is a constant.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, LinearAttentionLayer

from framework.retention.block_pass import BlockPass, Phase, current_pass, outside_of_passes
from framework.retention.runs import RunRows, TokensBefore

CACHES = ("cache_params", "past_key_values")
"""Names under which mixers take the cache."""

UPDATES = frozenset({"update_conv_state", "update_recurrent_state"})
"""What mixers call on the cache with a state, and other modules do not."""

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""Arguments that say where documents begin in a row of tokens, which are not those of a run."""


@dataclass
class State:
    """What a mixer hands over at one position, by the number that it gives each state.

    Attributes:
        conv: `[batch, channels, kernel]`, the last inputs of a convolution.
        recurrent: `[batch, …]`.
    """

    conv: dict[int, Tensor] = field(default_factory=dict)
    recurrent: dict[int, Tensor] = field(default_factory=dict)

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """See `BlockPass.replace`."""
        for states in (self.conv, self.recurrent):
            for number, state in states.items():
                states[number] = change(state)


class _StateReachedError(Exception):
    """Ends a pass over the tokens before a run."""


class _Noted(LinearAttentionLayer):
    """A mixer's cache before its first token, which keeps the state that it is given, as transformers' own does.

    Args:
        updates: number of the update that ends the pass; None for one that runs to its end.
    """

    def __init__(self, updates: int | None) -> None:
        super().__init__()
        self.state, self.updates, self._last = State(), 0, updates

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Keep the last columns of `conv_states [batch, channels, tokens]`."""
        size = conv_kernel_size or conv_states.shape[-1]
        missing = max(0, size - conv_states.shape[-1])
        self.state.conv[state_idx] = functional.pad(conv_states[..., -size:], (missing, 0)).clone()
        self._count()
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the state."""
        self.state.recurrent[state_idx] = recurrent_states.clone()
        self._count()
        return recurrent_states

    def _count(self) -> None:
        self.updates += 1
        if self.updates == self._last:
            raise _StateReachedError


class _HandedOver(LinearAttentionLayer):
    """A mixer's cache in the middle of its sequences. It stays as it is, because autograd may have saved a state."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.record_past = True
        for index in state.conv.keys() | state.recurrent.keys():
            self.has_previous_state[index] = True
            self.conv_states[index] = state.conv.get(index)
            self.recurrent_states[index] = state.recurrent.get(index)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """The state's columns and those of `conv_states [batch, channels, tokens]`."""
        before = self.conv_states[state_idx]
        assert before is not None
        return torch.cat([before, conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """The state after the run, which nobody asks for."""
        return recurrent_states


class _KnownOutputs:
    """Stands in for a child of a mixer and gives its outputs for the tokens before the runs, where they are known."""

    def __init__(self, child: nn.Module, outputs: list[Tensor | None], before: TokensBefore) -> None:
        self._child, self._outputs, self._before = child, deque(outputs), before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = self._outputs.popleft()
        return self._child(*args, **kwargs) if known is None else self._before.take(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)


class RecurrentMixer(nn.Module):
    """A mixer that keeps its state at the runs' first tokens in a record pass, and starts from it in the replay.

    Put in front of a mixer's own class by `recurrent_class`.

    Attributes:
        plain: that class.
        state_updates: number of updates of its cache in a pass; None as long as that is not known.
    """

    plain: type[nn.Module]
    state_updates: int | None = None

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mixer's own, `[batch, tokens, width]`; in the replay `[1, rows, width]`."""
        current = current_pass()
        if current is None:
            return self.plain.forward(self, *args, **kwargs)
        call = _signature(self.plain).bind(self, *args, **kwargs)
        named = call.arguments | call.arguments.get("kwargs", {})
        if packed := [name for name in PACKED if named.get(name) is not None]:
            raise ValueError(
                f"{self.plain.__name__} got {', '.join(packed)}: token selection replays it from its state and cannot "
                "tell it where documents begin; leave padding-free packing to position_ids"
            )
        return (_record if current.phase is Phase.RECORD else _replay)(self, current, call)


@cache
def recurrent_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a mixer whose own class is `plain`; of the same name, because modelling files go by it."""
    body = {"plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (RecurrentMixer, plain), body)


@cache
def _signature(plain: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(plain.forward)


def _record(mixer: RecurrentMixer, current: BlockPass, call: inspect.BoundArguments) -> Any:
    with _outputs_of_children(mixer, current.rows) as outputs:
        result = mixer.plain.forward(*call.args, **call.kwargs)
    noted = _over_tokens_before(mixer, current.rows.before, call, outputs)
    mixer.state_updates = noted.updates
    current.states[mixer].append(noted.state)
    return result


@contextlib.contextmanager
def _outputs_of_children(mixer: nn.Module, rows: RunRows) -> Iterator[dict[str, list[Tensor | None]]]:
    """Within this context every output of a child for the batch's tokens is kept, None for others, in order."""
    outputs: defaultdict[str, list[Tensor | None]] = defaultdict(list)

    def note(name: str, child: nn.Module, args: Any, output: Any) -> None:
        by_token = isinstance(output, Tensor) and output.dim() > 2 and output.shape[:2] == (rows.batch, rows.tokens)
        outputs[name].append(output if by_token else None)

    handles = [child.register_forward_hook(partial(note, name)) for name, child in mixer.named_children()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _over_tokens_before(
    mixer: RecurrentMixer,
    before: TokensBefore,
    call: inspect.BoundArguments,
    outputs: dict[str, list[Tensor | None]],
) -> _Noted:
    """Run a mixer over the tokens before the runs; what its cache was given."""
    noted, again = _Noted(mixer.state_updates), _changed(call, lambda v: before.take(v) if before.has_tokens(v) else v)
    _hand(mixer, again, noted)
    mask = again.arguments.get("attention_mask")
    if before.padded and mask is None and "attention_mask" in _signature(mixer.plain).parameters:
        again.arguments["attention_mask"] = before.real
    known = {
        name: _KnownOutputs(mixer.get_submodule(name), kept, before)
        for name, kept in outputs.items()
        if any(output is not None for output in kept)
    }
    children = dict(mixer._modules)
    # Not as attributes: a child that stands in is no module, and nobody else is to see it.
    mixer._modules.update(known)
    try:
        with outside_of_passes(), contextlib.suppress(_StateReachedError):
            mixer.plain.forward(*again.args, **again.kwargs)
    finally:
        mixer._modules.update(children)
    return noted


def _replay(mixer: RecurrentMixer, current: BlockPass, call: inspect.BoundArguments) -> Any:
    rows = current.rows
    run = _changed(call, lambda value: rows.by_sequence(value) if _has_rows(value, rows) else value)
    _hand(mixer, run, _HandedOver(current.states[mixer].popleft()))
    with current.by_sequence():
        output = mixer.plain.forward(*run.args, **run.kwargs)
    if isinstance(output, tuple):
        return (rows.from_sequences(output[0]), *output[1:])
    return rows.from_sequences(output)


def _changed(call: inspect.BoundArguments, change: Callable[[Any], Any]) -> inspect.BoundArguments:
    """A call with every argument changed, those in pairs and those that the signature does not name included."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(each) for key, each in value.items()}
        return type(value)(map(changed, value)) if type(value) in (tuple, list) else change(value)

    return inspect.BoundArguments(call.signature, {name: changed(value) for name, value in call.arguments.items()})


def _hand(mixer: nn.Module, call: inspect.BoundArguments, layer: LinearAttentionLayer) -> None:
    """Give a call a cache that has `layer` in the mixer's place."""
    call.arguments[_cache_argument(mixer.plain)] = Cache(layers=[layer] * (mixer.layer_idx + 1))


def _has_rows(value: Any, rows: RunRows) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, len(rows.position))


@cache
def _cache_argument(plain: type[nn.Module]) -> str | None:
    """The name under which the forward of a class takes a cache, or None if it takes none."""
    return next((name for name in CACHES if name in _signature(plain).parameters), None)


@cache
def _updates_states(plain: type[nn.Module]) -> bool:
    """Whether a class puts states into a cache: its functions name what does."""
    own = (value for kind in plain.__mro__ if kind is not nn.Module for value in vars(kind).values())
    functions = (inspect.unwrap(value) for value in own if inspect.isfunction(value))
    return any(not UPDATES.isdisjoint(function.__code__.co_names) for function in functions)


def mixers_of(block: nn.Module) -> list[str]:
    """Modules inside a block, by name, that put a recurrent state into a cache."""
    return [
        name
        for name, module in block.named_modules()
        if module is not block
        and _updates_states(type(module))
        and _cache_argument(type(module)) is not None
        and hasattr(module, "layer_idx")
    ]


def install(block: nn.Module, mixers: dict[str, int | None]) -> None:
    """Let mixers of a block start from their state in replays.

    Args:
        block: changed in place.
        mixers: number of state updates by name, None where that is to be found out.
    """
    for name, updates in mixers.items():
        mixer = block.get_submodule(name)
        mixer.__class__ = recurrent_class(type(mixer))
        mixer.state_updates = updates


def remove(block: nn.Module) -> None:
    """Undo `install`."""
    for module in block.modules():
        if isinstance(module, RecurrentMixer):
            del module.state_updates
            module.__class__ = module.plain
