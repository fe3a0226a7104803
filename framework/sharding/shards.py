"""Rows of whole tensors: what FSDP2's ranks hold, give away and take over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from framework.errors import RunError, UserError
from framework.sharding.fragments import Fragment, StoredTensors, whole
from framework.sharding.local_shards import local_tensor

_LISTED_NAMES = 8


@dataclass(frozen=True)
class Shard:
    """This rank's part of a parameter: consecutive rows, as `torch.chunk` cuts them; the last ranks' may be empty.

    Attributes:
        name: of the parameter.
        parameter: the sharded parameter.
        index: of the part.
        count: number of parts.
    """

    name: str
    parameter: DTensor
    index: int
    count: int

    @property
    def local(self) -> Tensor:
        """`[rows, …]`: the part itself, not a copy."""
        return local_tensor(self.parameter)

    @property
    def trained(self) -> bool:
        """Whether the parameter is."""
        return self.parameter.requires_grad

    @property
    def first_row(self) -> int:
        """Of the whole parameter."""
        rows = self.parameter.shape[0]
        return min(rows, -(-rows // self.count) * self.index)

    @property
    def start(self) -> int:
        """The first element's index in the whole parameter, in row-major order."""
        return self.first_row * prod(self.parameter.shape[1:])

    def fragment(self, name: str, values: Tensor) -> Fragment:
        """A tensor of the part's shape as a range of one of the parameter's shape."""
        return Fragment(name, tuple(self.parameter.shape), self.start, values.detach().view(-1))

    def take(self, whole: Tensor) -> None:
        """Copy the part's rows from a value of the whole parameter.

        Raises:
            ValueError: its shape is another one.
        """
        if whole.shape != self.parameter.shape:
            raise ValueError(f"{self.name}: a value of shape {[*whole.shape]} for {[*self.parameter.shape]}")
        self.local.copy_(whole[self.first_row : self.first_row + len(self.local)])

    def state_fragments(self, state: Mapping[str, Tensor], *, scalars: bool) -> Iterator[Fragment]:
        """The parameter's state in an optimiser: what has the part's shape as ranges, and scalars if asked for.

        Raises:
            RunError: a tensor is neither, so no other number of ranks could take it over.
        """
        for key, value in state.items():
            name = f"{key}.{self.name}"
            if value.shape == self.local.shape:
                yield self.fragment(name, value)
            elif value.dim() > 0:
                raise RunError(f"{name}: the optimiser holds {[*value.shape]} for a shard of {[*self.local.shape]}")
            elif scalars:
                yield whole(name, value)

    def read(self, stored: StoredTensors, name: str) -> Tensor:
        """The part's range of a stored tensor of the parameter's shape, in the part's shape; or a scalar."""
        if stored.shape(name) == ():
            return stored.read(name).view(())
        return stored.read(name, self.start, self.local.numel()).view(self.local.shape)


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
