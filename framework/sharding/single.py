"""The engine of one process on one device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from framework.checkpoint.weights import load_weights
from framework.config import LossScaleConfig
from framework.sharding.fragments import Fragment, StoredTensors, whole
from framework.sharding.loss_scale import LossScale
from framework.sharding.optimizer_states import check_states, exported, take_over
from framework.sharding.precision import PRECISIONS
from framework.sharding.protocol import Held, InitialTensors, OptimizerFactory, StepResult
from framework.sharding.stepping import clipped_step
from framework.sharding.weight_names import WeightNames, saved_tensors


class SingleEngine:
    """Model, gradients and optimiser whole, on the first CUDA device if there is one, else on the CPU.

    The fp16 precision scales losses (`LossScale`); a step whose gradients overflow is skipped and the scale halved.
    Where it falls no lower, an overflow is not the scale's fault and counts as not finite.
    """

    sharded = False

    def __init__(
        self,
        precision: str,
        device: torch.device | None = None,
        *,
        loss_scale: float | LossScaleConfig | None = None,
    ) -> None:
        """Choose the device.

        Args:
            precision: a key of `PRECISIONS`.
            device: instead of the choice above.
            loss_scale: of fp16: a constant, or how it follows the gradients; None for the latter's defaults.
        """
        self.device = device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self._precision = PRECISIONS[precision]
        self._scale = LossScale(loss_scale) if self._precision.loss_scaling else None

    def prepare(
        self, model: nn.Module, build_optimizer: OptimizerFactory, initial: InitialTensors | None = None
    ) -> None:
        """Move a model that has all of its weights to the device, and build its optimiser."""
        assert initial is None
        self.model = model.to(self.device)
        self.optimizer = build_optimizer(self.model)

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast in the precision's dtype, or nothing."""
        if self._precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self._precision.autocast))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a scalar loss, scaled in fp16."""
        (loss if self._scale is None else loss * self._scale.value).backward()

    def step(self, *, loss: Tensor, max_grad_norm: float | None, learning_rate: float) -> StepResult:
        """See `Engine.step`."""
        trained = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        scale = 1.0 if self._scale is None else self._scale.value
        # The step's one wait for the device.
        loss_value, norm = torch.stack((loss.detach().float(), _global_norm(gradients, self.device) / scale)).tolist()
        result = clipped_step(
            self.optimizer,
            gradients,
            self._scale,
            loss=loss_value,
            norm=norm,
            max_grad_norm=max_grad_norm,
            learning_rate=learning_rate,
        )
        self.discard_gradients()
        return result

    def discard_gradients(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Iterator[Fragment]:
        """See `Engine.weights`: all of them, whole."""
        return (whole(name, tensor) for name, tensor in saved_tensors(self.model).items())

    def optimizer_state(self) -> Iterator[Fragment]:
        """See `Engine.optimizer_state`: all of it, whole."""
        for name, parameter in self._trained().items():
            for key, value in exported(self.optimizer, parameter).items():
                yield whole(f"{key}.{name}", value)

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`."""
        return {} if self._scale is None else {"loss_scale": self._scale.state_dict()}

    def load(self, weights: StoredTensors, optimizer: StoredTensors, state: Mapping[str, Any]) -> None:
        """See `Engine.load`."""
        trained = self._trained()
        WeightNames.of(self.model).check(weights)
        states = check_states(optimizer, {name: tuple(parameter.shape) for name, parameter in trained.items()})
        load_weights(weights, self.model)
        for name, parameter in trained.items():
            stored = {key: f"{key}.{name}" for key in states[name]}
            read = {key: optimizer.read(full).view(optimizer.shape(full)) for key, full in stored.items()}
            take_over(self.optimizer, parameter, read)
        if self._scale is not None and "loss_scale" in state:
            self._scale.load_state_dict(state["loss_scale"])

    def _trained(self) -> dict[str, nn.Parameter]:
        """What the optimiser updates, by its first name."""
        updated = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter in updated}

    def held(self) -> Held:
        """See `Engine.held`."""
        parameters = list(self.model.parameters())
        return Held(
            weights=[*parameters, *self.model.buffers()],
            gradients=[parameter.grad for parameter in parameters if parameter.grad is not None],
            optimizer=[value for states in self.optimizer.state.values() for value in states.values()],
        )

    def close(self) -> None:
        """See `Engine.close`: nothing would be kept."""


def _global_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm of all gradients together, computed in float32 whatever their dtype; a float32 scalar."""
    if not gradients:
        return torch.zeros((), device=device)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
