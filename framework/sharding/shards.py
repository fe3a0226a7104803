"""Rows of whole tensors: what FSDP2's ranks hold, give away and take over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor

from framework.errors import RunError
from framework.sharding.fragments import Fragment, StoredTensors, whole
from framework.sharding.local_shards import local_tensor


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
