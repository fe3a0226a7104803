"""Names of a model's modules and parameters that are the same in all of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from framework.models.wrapping import unwrapped
from framework.planner.course import Place
from framework.planner.held import Weight, Weights
from framework.retention import blocks_of


@dataclass(frozen=True)
class Naming:
    """Where the modules and parameters of a model are.

    Attributes:
        modules: each module's place.
        parameters: each parameter's; a tied one has the first.
    """

    modules: dict[nn.Module, Place]
    parameters: dict[nn.Parameter, Place]

    @classmethod
    def of(cls, model: nn.Module) -> Naming:
        """Of a model with its adapter."""
        blocks = blocks_of(unwrapped(model)).values()
        modules: dict[nn.Module, Place] = {}
        for name, module in model.named_modules():
            modules.setdefault(module, (name, None))
        for number, block in enumerate(blocks):
            for name, module in block.named_modules():
                modules[module] = (name, number)
        parameters: dict[nn.Parameter, Place] = {}
        for module, (name, within) in modules.items():
            for own, parameter in module.named_parameters(recurse=False):
                parameters.setdefault(parameter, (f"{name}.{own}" if name else own, within))
        return cls(modules, parameters)


def weights_of(model: nn.Module, groups: Sequence[dict[str, Any]]) -> Weights:
    """The parameters of a model with its adapter; it may be on the meta device.

    Args:
        model: as it is trained.
        groups: of the optimiser, from `parameter_groups`.
    """
    group_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
    places = Naming.of(model).parameters
    found = [
        Weight(*places[p], p.numel(), p.element_size(), group_of.get(p), p.shape[0] if p.dim() else 1)
        for p in model.parameters()
    ]
    return Weights(tuple(found), sum(buffer.nbytes for buffer in model.buffers()))
