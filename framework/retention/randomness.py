"""Random draws inside a block: made for all rows in the record pass, repeated at the selected rows in the replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from framework.retention.block_pass import BlockPass, Phase

_NEW_DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.multinomial}
_DRAWS_LIKE = {torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli}
_DRAWS_IN_PLACE = {Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.exponential_}
_DRAWS = _NEW_DRAWS | _DRAWS_LIKE | _DRAWS_IN_PLACE


def draws_in_blocks(blocks: list[nn.Module], config: PreTrainedConfig) -> bool:
    """Whether a block may draw random numbers: a dropout module, or a rate in the configuration (functional calls)."""
    modules = (module for block in blocks for module in block.modules())
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in modules):
        return True
    rates = (value for key, value in config.to_dict().items() if "drop" in key)
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def generator_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that a block on `device` draws from by default; unchanged if it drew nothing."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def set_generator_states(device: torch.device, states: list[Tensor]) -> None:
    """Set what `generator_states` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class ReplayedRandomness(TorchFunctionMode):
    """Keeps the noise of every draw in the record pass and uses its selected rows in the replay.

    The record pass draws exactly as the plain model does, so the forward value is the ordinary one.
    """

    def __init__(self, current: BlockPass) -> None:
        super().__init__()
        self.current = current

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercept dropout and plain draws; everything else runs as it is."""
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func in _DRAWS:
            return self._draw(func, args, kwargs)
        return func(*args, **kwargs)

    @torch.compiler.disable
    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """`input * noise` with noise in {0, 1/(1-p)}; the noise is kept as a bool mask, a byte an element."""
        if not training or p == 0.0:
            return input
        if self.current.phase is Phase.RECORD:
            noise = functional.dropout(torch.ones_like(input), p, training=True)
            self.current.random.append(self._rows(noise != 0))
            return input * noise
        kept = self.current.as_seen(self.current.random.popleft()).view(input.shape).to(input.dtype)
        return input * (kept.div_(1 - p) if p < 1 else kept)

    @torch.compiler.disable
    def _draw(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.current.phase is Phase.RECORD:
            drawn = func(*args, **kwargs)
            self.current.random.append(self._rows(drawn.clone()))
            return drawn
        kept = self.current.as_seen(self.current.random.popleft())
        if func in _NEW_DRAWS:
            return kept
        if kept.shape != args[0].shape:
            raise RuntimeError(f"a draw of shape {[*args[0].shape]} was kept as {[*kept.shape]}")
        return args[0].copy_(kept) if func in _DRAWS_IN_PLACE else kept

    def _rows(self, drawn: Tensor) -> Tensor:
        """The selected rows of a draw over the batch's tokens; of a draw per sequence, its rows' own."""
        rows = self.current.rows
        if drawn.dim() >= 2 and drawn.shape[:2] == (rows.batch, rows.tokens):
            return rows.take(drawn)
        if drawn.dim() >= 2 and drawn.shape[0] == rows.batch * rows.tokens:
            return rows.take(drawn.view(rows.batch, rows.tokens, *drawn.shape[1:])).flatten(0, 1)
        if drawn.dim() >= 2 and drawn.shape[:2] == (rows.batch, 1):
            return drawn[rows.sequence].transpose(0, 1)
        return drawn
