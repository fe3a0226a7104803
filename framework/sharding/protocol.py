"""What the training loop asks of an engine.

A rank is one of the data-parallel processes; every method is called on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step saw.

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


class Engine(Protocol):
    """Holds the model and the optimiser on this rank's device.

    Attributes:
        device: where batches must be moved to.
        rank: of this process.
        world_size: number of processes.
        model: what to call for a forward pass; set by `prepare`.
    """

    device: torch.device
    rank: int
    world_size: int
    model: nn.Module

    def prepare(self, model: nn.Module, build_optimizer: OptimizerFactory) -> None:
        """Take over a model, the last transform: place or shard it, then build the optimiser on what results."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision in which forward passes run, evaluation included."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's loss, a scalar already divided by the window's global count."""
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
        """Free what `backward` has accumulated without a step."""
        ...

    def save(self, directory: Path) -> None:
        """Write this rank's weights (only the trainable ones where some are frozen), optimiser and loss scale.

        Raises:
            OSError: the disk is full, or another failure to write.
        """
        ...

    def load(self, directory: Path) -> None:
        """Take over what `save` wrote; `prepare` was called before.

        Raises:
            UserError: the tensors are not those of this model and optimiser.
        """
        ...

    def sum_over_ranks(self, value: float) -> float:
        """The sum of a number over all ranks, on every rank."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank raises a flag; every rank gets the same answer."""
        ...

    def held_tensors(self) -> Iterator[Tensor]:
        """Weights, buffers and optimiser state that this rank holds now, for counting their bytes."""
        ...

    def gathered_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of all weights on the CPU, one at a time, so that memory stays bounded."""
        ...
