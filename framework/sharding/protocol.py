"""What the training loop asks of an engine.

A rank is one of the data-parallel processes; every method is called on all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from framework.sharding.fragments import Fragment, StoredTensors

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
InitialTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step saw; the same on every rank.

    Attributes:
        loss: the window's loss, summed over micro-batches and ranks.
        grad_norm: global norm of the gradients before clipping, loss scale removed.
        finite: loss and gradients were finite; if not, the weights and the optimiser are as before the step. An
            overflow that the fp16 loss scale answers by becoming smaller counts as finite.
        skipped: no update was made: not finite, or such an overflow.
        loss_scale: that the step's losses were multiplied with; None without loss scaling.
    """

    loss: float
    grad_norm: float
    finite: bool
    skipped: bool
    loss_scale: float | None = None


class Held(NamedTuple):
    """The tensors that a rank holds now, without what others hold, for counting their bytes."""

    weights: list[Tensor]
    """Parameters, buffers and the optimiser's copies of parameters."""
    gradients: list[Tensor]
    optimizer: list[Tensor]
    buckets: Sequence[Tensor] = ()
    """Buffers of exchanges that are there between steps, too."""


class Engine(Protocol):
    """Holds the model and the optimiser, or this rank's part of them, on this rank's device.

    Attributes:
        device: where batches must be moved to.
        model: what to call for a forward pass, a plain or PEFT-wrapped Hugging Face model; set by `prepare`.
        sharded: whether `prepare` takes a model on the meta device, of which no rank ever holds the whole.
    """

    device: torch.device
    model: nn.Module
    sharded: bool

    def prepare(
        self, model: nn.Module, build_optimizer: OptimizerFactory, initial: InitialTensors | None = None
    ) -> None:
        """Take over a model, the last transform: place or shard it, then build the optimiser on what results.

        Args:
            model: with weights, or with tensors on the meta device.
            build_optimizer: called with the placed or sharded model.
            initial: name and whole value, on the CPU, of every tensor of the model that is on the meta device, one at
                a time in any order; the same on every rank. None for a model that has all of its weights.
        """
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision in which forward passes run, evaluation included."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's loss, a scalar already divided by the window's global count.

        Gradients are summed, not averaged, over micro-batches and ranks.
        """
        ...

    def step(self, *, loss: Tensor, max_grad_norm: float | None, learning_rate: float) -> StepResult:
        """Clip, update, and free the gradients; one wait for the device in all.

        Args:
            loss: sum of the window's micro-batch losses on this rank, a float32 scalar.
            max_grad_norm: bound of the global norm; None for none.
            learning_rate: of this step; a parameter group multiplies it with its `learning_rate_scale`, if it has one.
        """
        ...

    def discard_gradients(self) -> None:
        """Free what `backward` has accumulated without a step; everything else is as if it had not been called."""
        ...

    def weights(self) -> Iterator[Fragment]:
        """What this rank is to save of the weights: only the trainable ones with an adapter, and persistent buffers.

        Over all ranks every element comes once. In the precision that updates are made in.
        """
        ...

    def optimizer_state(self) -> Iterator[Fragment]:
        """What this rank is to save of the optimiser's tensors; over all ranks every element comes once."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What else there is to save, of plain values, the same on every rank: the loss scale."""
        ...

    def load(self, weights: StoredTensors, optimizer: StoredTensors, state: Mapping[str, Any]) -> None:
        """Take over what any engine with any number of ranks saved; `prepare` was called before.

        Raises:
            UserError: the tensors are not those of this model and optimiser.
        """
        ...

    def held(self) -> Held:
        """What this rank holds now."""
        ...

    def close(self) -> None:
        """Let go of what the process would keep of model and optimiser; the last call."""
        ...
