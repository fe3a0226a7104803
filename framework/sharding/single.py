"""The engine of one process on one device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from framework.checkpoint.weights import WEIGHTS_FILE, load_weights, save_weights, write_tensors
from framework.config import LossScaleConfig
from framework.errors import UserError
from framework.sharding.precision import PRECISIONS
from framework.sharding.protocol import OptimizerFactory, StepResult

OPTIMIZER_FILE = "optimizer.safetensors"
SCALER_FILE = "loss_scale.json"


class SingleEngine:
    """Model, gradients and optimiser whole, on the first CUDA device if there is one, else on the CPU.

    The fp16 precision scales losses with torch's `GradScaler`, on the CPU too; an overflowing step is skipped and the
    scale halved. Where it falls no lower, an overflow is not the scale's fault and counts as not finite.
    """

    rank = 0
    world_size = 1

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

    def prepare(self, model: nn.Module, build_optimizer: OptimizerFactory) -> None:
        """Move the model to the device and build its optimiser."""
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

    def save(self, directory: Path) -> None:
        """Write `model.safetensors`, `optimizer.safetensors` and, in fp16, `loss_scale.json` into a directory.

        Optimiser tensors are called `STATE.PARAMETER`, such as `exp_avg.model.norm.weight`.
        """
        save_weights(directory / WEIGHTS_FILE, self.model)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        states = self.optimizer.state.items()
        tensors = {f"{key}.{names[p]}": value for p, values in states for key, value in values.items()}
        write_tensors(directory / OPTIMIZER_FILE, tensors)
        if self._scaler.is_enabled():
            (directory / SCALER_FILE).write_text(json.dumps(self._scaler.state_dict()), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """See `Engine.load`."""
        load_weights(directory / WEIGHTS_FILE, self.model)
        named = dict(self.model.named_parameters())
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        with safe_open(directory / OPTIMIZER_FILE, "pt", device="cpu") as stored:
            for key in stored.keys():
                state, name = key.split(".", 1)
                if named.get(name) not in groups:
                    raise UserError(f"{directory / OPTIMIZER_FILE}: {name} is not a trainable parameter of this model")
                # A step counter lives where torch keeps it: on the device for fused updates only.
                parameter = named[name]
                on_device = state != "step" or groups[parameter].get("fused")
                value = stored.get_tensor(key)
                self.optimizer.state[parameter][state] = value.to(parameter.device) if on_device else value
        if self._scaler.is_enabled():
            saved = json.loads((directory / SCALER_FILE).read_text(encoding="utf-8"))
            # How the scale moves is this run's setting; where it has got to is the checkpoint's.
            if self._constant_scale is None:
                reached = {
                    "scale": max(saved["scale"], self._minimum_scale),
                    "_growth_tracker": saved["_growth_tracker"],
                }
                self._scaler.load_state_dict(self._scaler.state_dict() | reached)

    def sum_over_ranks(self, value: float) -> float:
        """The value itself."""
        return value

    def any_rank(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def held_tensors(self) -> Iterator[Tensor]:
        """See `Engine.held_tensors`."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for states in self.optimizer.state.values():
            yield from states.values()

    def gathered_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.gathered_state_dict`."""
        for name, tensor in self.model.state_dict().items():
            yield name, tensor.detach().cpu()


def _global_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm of all gradients together, computed in float32 whatever their dtype; a float32 scalar."""
    if not gradients:
        return torch.zeros((), device=device)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
