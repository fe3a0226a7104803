"""Rows of whole tensors: what FSDP2's ranks hold, give away and take over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from framework.errors import RunError, UserError
from framework.sharding.fragments import Fragment, StoredTensors
from framework.sharding.local_shards import local_tensor

_LISTED_NAMES = 8
_WEIGHTS_HINT = "use the `model` section that they were saved with"
_OPTIMIZER_HINT = "use the `model` and `optimizer` sections that it was saved with"


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

    def read(self, stored: StoredTensors, name: str) -> Tensor:
        """The part's range of a stored tensor of the parameter's shape, in the part's shape."""
        return stored.read(name, self.start, self.local.numel()).view(self.local.shape)


def state_fragments(
    shards: Mapping[Tensor, Shard], states: Mapping[Tensor, Mapping[str, Tensor]], *, scalars: bool
) -> Iterator[Fragment]:
    """An optimiser's tensors: those of a part's shape as ranges, and scalars if asked for.

    Args:
        shards: by the optimiser's parameter.
        states: the optimiser's `state`.
        scalars: whether this rank is the one that gives them.

    Raises:
        RunError: a tensor is neither, so no other number of ranks could take it over.
    """
    for parameter, state in states.items():
        shard = shards[parameter]
        for key, value in state.items():
            name = f"{key}.{shard.name}"
            if value.shape == parameter.shape:
                yield shard.fragment(name, value)
            elif value.dim() > 0:
                raise RunError(f"{name}: the optimiser holds {[*value.shape]} for a shard of {[*parameter.shape]}")
            elif scalars:
                yield Fragment(name, (), 0, value.detach().view(-1))


def check_weights(stored: StoredTensors, names: Mapping[str, Tensor], required: Iterable[str]) -> None:
    """Make sure that stored weights are those of a model.

    Args:
        stored: the weights.
        names: the model's tensors under every name that they have.
        required: first names of those that must be stored, under any of their names.

    Raises:
        UserError: names are missing or unexpected, or shapes differ; says which.
    """
    found = [*stored.names()]
    present = {id(names[name]) for name in found if name in names}
    _refuse(
        f"these weights are not those of the configured model; {_WEIGHTS_HINT}",
        missing=[name for name in required if id(names[name]) not in present],
        unexpected=[name for name in found if name not in names],
        shapes=_other_shapes(stored, {name: tuple(names[name].shape) for name in found if name in names}),
    )


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
    _refuse(
        f"this optimiser state is not that of the configured model; {_OPTIMIZER_HINT}",
        missing=[f"{s}.{name}" for name, found in states.items() if found for s in every if s not in found],
        unexpected=unexpected,
        shapes=_other_shapes(stored, expected),
    )
    return states


def _other_shapes(stored: StoredTensors, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [
        f"{name} {[*stored.shape(name)]} in the checkpoint, {[*shape]} in the model"
        for name, shape in expected.items()
        if tuple(stored.shape(name)) != shape
    ]


def _refuse(what: str, *, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
    kinds = (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
    lines = [f"  {title}: {_listed(entries)}" for title, entries in kinds if entries]
    if lines:
        raise UserError("\n".join([what, *lines]))


def _listed(entries: list[str]) -> str:
    more = f", and {len(entries) - _LISTED_NAMES} more" if len(entries) > _LISTED_NAMES else ""
    return ", ".join(entries[:_LISTED_NAMES]) + more


def received(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a stored value on a tensor's device, in its dtype if both are floating-point, contiguous."""
    floating = value.is_floating_point() and like.is_floating_point()
    return torch.empty_like(value, dtype=like.dtype if floating else value.dtype, device=like.device).copy_(value)
