"""AdamW, and the variant whose bf16 weights are rounded stochastically."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framework.config import Config
from framework.errors import UserError
from framework.sharding.precision import PRECISIONS
from framework.training.eight_bit import EightBitAdamW
from framework.training.parameter_groups import describe_groups, parameter_groups

# Elements updated at once by `StochasticAdamW`: bounds its float32 temporaries to a few times 64 MiB.
CHUNK = 1 << 24


def optimizer_factory(
    config: Config, report: Callable[[str], None] | None = None
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """What builds a config's AdamW over the trainable parameters of a model.

    The model must be on its device, with its final parameters (adapters added, shards made). The learning rate is
    overwritten by the schedule at every step.

    Args:
        config: of the run.
        report: is told a line for each group of parameters.
    """
    settings = config.optimizer

    def build(model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, settings)
        if not groups:
            raise UserError("model.adapter: no parameter of the model is trainable")
        for line in describe_groups(groups, settings.learning_rate) if report is not None else []:
            report(f"optimizer: {line}")
        rate, betas, epsilon = settings.learning_rate, settings.betas, settings.epsilon
        if settings.name == "adamw_8bit":
            return EightBitAdamW(groups, lr=rate, betas=betas, eps=epsilon)
        if PRECISIONS[settings.precision].stochastic_rounding:
            return StochasticAdamW(groups, lr=rate, betas=betas, eps=epsilon, seed=config.run.seed)
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)

    return build


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down at random, such that the expectation is the value itself.

    bfloat16 is the upper half of float32: a uniform 16-bit number added to the bits carries into the upper half with a
    probability equal to the lower half's share of the gap between the two neighbours.

    Args:
        value: float32, finite, any shape.
        generator: on the device of `value`.

    Returns:
        bfloat16, same shape. What bfloat16 represents is returned exactly.
    """
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = (value.view(torch.int32) + noise).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW that computes in float32 and rounds bf16 weights and moments stochastically when it stores them.

    With rounding to nearest, an update smaller than half the gap between two bf16 numbers (1/256 of the weight) is lost
    every time; a stochastic rounding keeps it in expectation. The same holds for the second moment, whose relative
    change per step is `1 - beta2`.

    Bytes per parameter: weight 2, gradient 2, moments 2 + 2, together 8 (torch's AdamW on float32: 16). Float32
    parameters, which adapters may have, are updated without rounding and have float32 moments.

    The noise of step t is drawn from a generator seeded by (seed, t, shard): nothing about it needs saving. `shard` is
    what an engine that shards parameters writes into the groups, so that each shard has noise of its own; 0 without.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, seed: int, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, in chunks; gradients are left as they are."""
        assert closure is None
        self._generators.clear()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        generator = self._generator(parameter.device, step, group.get("shard", 0))
        assert parameter.grad is not None
        stored = (parameter, state["exp_avg"], state["exp_avg_sq"])
        views = (*(tensor.view(-1) for tensor in stored), parameter.grad.reshape(-1))
        for weight, mean, square, gradient in zip(*(view.split(CHUNK) for view in views), strict=True):
            gradient = gradient.float()
            new_mean = mean.float().lerp_(gradient, 1 - beta1)
            new_square = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            new_weight = weight.float().mul(1 - group["lr"] * group["weight_decay"])
            new_weight.addcdiv_(new_mean, denominator, value=-group["lr"] / (1 - beta1**step))
            for target, value in ((weight, new_weight), (mean, new_mean), (square, new_square)):
                target.copy_(round_stochastically(value, generator) if target.dtype == torch.bfloat16 else value)

    def _generator(self, device: torch.device, step: int, shard: int) -> torch.Generator:
        """One stream of noise per device and step, shared by the parameters in their order."""
        if device not in self._generators:
            # Mixed, because torch's CPU generator looks at 32 bits of its seed only.
            mixed = int(np.random.SeedSequence([self._seed, step, shard]).generate_state(1)[0])
            self._generators[device] = torch.Generator(device).manual_seed(mixed)
        return self._generators[device]
