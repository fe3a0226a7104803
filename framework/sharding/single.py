"""The engine of one process on one device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from framework.checkpoint.weights import load_weights
from framework.config import LossScaleConfig
from framework.errors import UserError
from framework.sharding.fragments import Fragment, StoredTensors, whole
from framework.sharding.precision import PRECISIONS
from framework.sharding.protocol import Held, InitialTensors, OptimizerFactory, StepResult
from framework.sharding.weight_names import saved_tensors


class SingleEngine:
    """Model, gradients and optimiser whole, on the first CUDA device if there is one, else on the CPU.

    The fp16 precision scales losses with torch's `GradScaler`, on the CPU too; an overflowing step is skipped and the
    scale halved. Where it falls no lower, an overflow is not the scale's fault and counts as not finite.
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
        self._constant_scale = loss_scale if isinstance(loss_scale, float) else None
        scaling = loss_scale if isinstance(loss_scale, LossScaleConfig) else LossScaleConfig()
        self._minimum_scale = scaling.minimum
        self._scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=self._constant_scale or scaling.initial,
            growth_interval=scaling.growth_interval,
            enabled=self._precision.loss_scaling,
        )

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
        self._scaler.scale(loss).backward()

    def step(self, *, loss: Tensor, max_grad_norm: float | None, learning_rate: float) -> StepResult:
        """See `Engine.step`."""
        self._scaler.unscale_(self.optimizer)
        trainable = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _global_norm([p.grad for p in trainable if p.grad is not None], self.device)
        scale = self._scaler.scale(torch.ones((), device=self.device))
        # The step's one wait for the device.
        loss_value, norm_value, scale_value = torch.stack((loss.detach().float(), norm, scale)).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            if max_grad_norm is not None:
                clip_grads_with_norm_(trainable, max_grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group.get("learning_rate_scale", 1.0)
            self.optimizer.step()
        too_large = math.isfinite(loss_value) and not finite and self._can_fall(scale_value)
        if finite and self._constant_scale is None:
            self._scaler.update()
        elif too_large:
            # Halves the scale, but knows no minimum and no norm that overflows in float32 where no gradient does.
            self._scaler.update()
            self._scaler.update(max(scale_value / 2, self._minimum_scale))
        else:
            self._scaler.update(scale_value)
        self.discard_gradients()
        return StepResult(
            loss_value,
            norm_value,
            finite=finite or too_large,
            skipped=not finite,
            loss_scale=scale_value if self._scaler.is_enabled() else None,
        )

    def _can_fall(self, scale: float) -> bool:
        """Whether a smaller loss scale is an answer to gradients that overflow."""
        return self._scaler.is_enabled() and self._constant_scale is None and scale > self._minimum_scale

    def discard_gradients(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Iterator[Fragment]:
        """See `Engine.weights`: all of them, whole."""
        return (whole(name, tensor) for name, tensor in saved_tensors(self.model).items())

    def optimizer_state(self) -> Iterator[Fragment]:
        """See `Engine.optimizer_state`: all of it, whole."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, states in self.optimizer.state.items():
            for key, value in states.items():
                yield whole(f"{key}.{names[parameter]}", value)

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`: in fp16 the loss scale, as `GradScaler` describes it."""
        return {"loss_scale": self._scaler.state_dict()} if self._scaler.is_enabled() else {}

    def load(self, weights: StoredTensors, optimizer: StoredTensors, state: Mapping[str, Any]) -> None:
        """See `Engine.load`."""
        load_weights(weights, self.model)
        named = dict(self.model.named_parameters())
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        for key in optimizer.names():
            kind, name = key.split(".", 1)
            parameter = named.get(name)
            if parameter is None or parameter not in groups:
                raise UserError(f"{optimizer}: {name} is not a trainable parameter of this model")
            # A step counter lives where torch keeps it: on the device for fused updates only.
            on_device = kind != "step" or groups[parameter].get("fused")
            value = torch.empty(
                optimizer.shape(key), dtype=optimizer.dtype(key), device=parameter.device if on_device else "cpu"
            )
            self.optimizer.state[parameter][kind] = value.copy_(optimizer.read(key).view(value.shape))
        # How the scale moves is this run's setting; where it has got to is the checkpoint's.
        if self._scaler.is_enabled() and self._constant_scale is None:
            saved = state["loss_scale"]
            reached = {"scale": max(saved["scale"], self._minimum_scale), "_growth_tracker": saved["_growth_tracker"]}
            self._scaler.load_state_dict(self._scaler.state_dict() | reached)

    def held(self) -> Held:
        """See `Engine.held`."""
        parameters = list(self.model.parameters())
        return Held(
            weights=[*parameters, *self.model.buffers()],
            gradients=[parameter.grad for parameter in parameters if parameter.grad is not None],
            optimizer=[value for states in self.optimizer.state.values() for value in states.values()],
        )


def _global_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm of all gradients together, computed in float32 whatever their dtype; a float32 scalar."""
    if not gradients:
        return torch.zeros((), device=device)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
