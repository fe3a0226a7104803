"""An optimiser's tensors on their way into a checkpoint and back, whatever form they have in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from framework.errors import UserError
from framework.sharding.fragments import StoredTensors

_LISTED_NAMES = 8


@runtime_checkable
class OwnFormat(Protocol):
    """An optimiser whose state has another form than the one that it is saved in."""

    def exported_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state in the form of torch's AdamW; nothing before the first step."""
        ...

    def import_state(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take over what `exported_state` gave."""
        ...


def exported(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    """A parameter's state as it is saved."""
    if isinstance(optimizer, OwnFormat):
        return optimizer.exported_state(parameter)
    return optimizer.state.get(parameter, {})


def take_over(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    """Give an optimiser a parameter's saved state, as copies on the parameter's device and in its dtype."""
    optimizer.state.pop(parameter, None)
    if isinstance(optimizer, OwnFormat):
        if state:
            optimizer.import_state(parameter, state)
        return
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for key, value in state.items():
        if value.dim() == 0:
            # Where torch keeps a step counter: on the device for fused updates only.
            copy = value.to(parameter.device if fused else "cpu", copy=True)
        else:
            copy = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter][key] = copy


def check_states(stored: StoredTensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Make sure that an optimiser's stored tensors are those of a model.

    Args:
        stored: tensors `STATE.WEIGHT`.
        shapes: of the trained weights.

    Returns:
        The states of each trained weight; none for one that never had a gradient.

    Raises:
        UserError: a weight is unknown, lacks a state that others have, or has one of another shape; says which.
    """
    states: dict[str, list[str]] = {name: [] for name in shapes}
    unexpected, expected = [], {}
    for full in stored.names():
        state, _, name = full.partition(".")
        if name not in shapes:
            unexpected.append(full)
            continue
        states[name].append(state)
        if stored.shape(full) != ():
            expected[full] = shapes[name]
    every = dict.fromkeys(state for found in states.values() for state in found)
    shapes_differ = [
        f"{name} {[*stored.shape(name)]} in the checkpoint, {[*shape]} in the model"
        for name, shape in expected.items()
        if tuple(stored.shape(name)) != shape
    ]
    missing = [f"{state}.{name}" for name, found in states.items() if found for state in every if state not in found]
    kinds = (("missing", missing), ("unexpected", unexpected), ("other shape", shapes_differ))
    if lines := [f"  {title}: {_listed(entries)}" for title, entries in kinds if entries]:
        raise UserError(
            f"{stored}: this optimiser state is not that of the configured model; "
            "use the `model` and `optimizer` sections that it was saved with\n" + "\n".join(lines)
        )
    return states


def _listed(entries: list[str]) -> str:
    more = f", and {len(entries) - _LISTED_NAMES} more" if len(entries) > _LISTED_NAMES else ""
    return ", ".join(entries[:_LISTED_NAMES]) + more
