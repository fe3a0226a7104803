"""The blocks' checkpointing function, held against whatever else would set it.

Trainers turn checkpointing on when training starts (`transformers.Trainer` if asked to, TRL unasked), which sets the
function of every block anew. While token selection is enabled it decides what blocks keep: such a request waits until
it is disabled, and a request for more than plain checkpointing, which would wait in vain, is refused.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Arguments of `torch.utils.checkpoint.checkpoint` that do not change what is kept.
_PLAIN_ARGUMENTS = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}


class Seam:
    """Puts a checkpointing function into a model's blocks and keeps it there.

    Args:
        model: the Hugging Face model.
        blocks: its blocks by name.
    """

    def __init__(self, model: PreTrainedModel, blocks: dict[str, nn.Module]) -> None:
        self.model, self.blocks = model, blocks
        self._function: Callable[..., Any] | None = None
        self._before: list[tuple[nn.Module, bool, Callable[..., Any] | None]] = []
        self._requested: dict[str, Any] | None = None

    def hold(self, function: Callable[..., Any]) -> None:
        """Set the function on all blocks; from now on other requests wait."""
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                state = module.gradient_checkpointing, vars(module).get("_gradient_checkpointing_func")
                self._before.append((module, *state))
        self._function = function
        self.model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
        self.model._held_seam = self
        self.model._set_gradient_checkpointing = types.MethodType(_note_request, self.model)

    def release(self) -> None:
        """Give the blocks back with checkpointing as it was, or as it was asked for meanwhile."""
        del self.model._set_gradient_checkpointing, self.model._held_seam
        if self._requested is not None:
            self.model._set_gradient_checkpointing(**self._requested)
            return
        for module, enabled, function in self._before:
            module.gradient_checkpointing = enabled
            if function is None:
                del module._gradient_checkpointing_func
            else:
                module._gradient_checkpointing_func = function

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context blocks ask for no checkpointing: in train mode those that do take no key/value cache."""
        modules = [module for module, *_ in self._before]
        for module in modules:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in modules:
                module.gradient_checkpointing = True

    def check(self) -> None:
        """Make sure that every block has the function.

        Raises:
            RuntimeError: one has not: a request was made behind the model's back, on a part of it.
        """
        for name, block in self.blocks.items():
            if not block.gradient_checkpointing or block._gradient_checkpointing_func != self._function:
                raise RuntimeError(
                    f"block {name} has lost its token-selective function: activation checkpointing was set on a part "
                    "of the model; leave that to token selection, which keeps less, or call "
                    "framework.disable_token_selection first"
                )

    def note(self, request: dict[str, Any]) -> None:
        """Keep a request, arguments of `_set_gradient_checkpointing`, for the time after `release`.

        Raises:
            ValueError: it asks for more than plain checkpointing of every block.
        """
        function = request["gradient_checkpointing_func"]
        plain = function is checkpoint or (
            isinstance(function, partial)
            and function.func is checkpoint
            and function.keywords.keys() <= _PLAIN_ARGUMENTS
        )
        if request["enable"] and (not plain or request.get("every_n_layers", 1) != 1):
            raise ValueError(
                "token selection decides what blocks keep for their backward pass, so activation checkpointing with "
                "offloading, on every n-th layer only or with a context function has no effect: set "
                "gradient_checkpointing=False, or leave such options out of gradient_checkpointing_kwargs"
            )
        logger.info("activation checkpointing is token selection's while that is enabled: the request waits")
        self._requested = request


def _note_request(
    model: PreTrainedModel,
    enable: bool = True,
    gradient_checkpointing_func: Callable[..., Any] = checkpoint,
    **options: Any,
) -> None:
    """Stands in for a model's `_set_gradient_checkpointing` while the seam is held."""
    request = {"enable": enable, "gradient_checkpointing_func": gradient_checkpointing_func, **options}
    model._held_seam.note(request)
