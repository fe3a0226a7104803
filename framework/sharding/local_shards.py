"""An optimiser that knows nothing of sharding, on this rank's shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class LocalShards:
    """Lets an optimiser update a rank's shards as plain tensors.

    Updates work element by element, so each rank can make those of its own shards. The optimiser's groups hold plain
    parameters from then on, which share their memory with the sharded ones; parameters of which this rank holds nothing
    are left out. Each group also gets `shard`, the number of the rank's shard, for updates that draw random numbers.

    Args:
        optimizer: built over sharded parameters, without state yet; its groups are changed in place.
        shard: number of this rank's shard.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shard: int) -> None:
        self.sharded: dict[Tensor, DTensor] = {}
        """The sharded parameter that each of the optimiser's belongs to."""
        for group in optimizer.param_groups:
            group["params"] = [*self._locals(group["params"])]
            group["shard"] = shard

    def _locals(self, parameters: Iterable[DTensor]) -> Iterator[nn.Parameter]:
        for parameter in parameters:
            local = local_tensor(parameter)
            if local.numel() > 0:
                plain = nn.Parameter(local, requires_grad=parameter.requires_grad)
                self.sharded[plain] = parameter
                yield plain

    def take_gradients(self) -> list[Tensor]:
        """Give the optimiser's parameters the gradients of the sharded ones; returns those that there are."""
        gradients = []
        for plain, parameter in self.sharded.items():
            # Before its first forward pass FSDP2 moves shards that are shorter than those of other ranks.
            plain.data = local_tensor(parameter)
            plain.grad = None if parameter.grad is None else local_tensor(parameter.grad)
            if plain.grad is not None:
                gradients.append(plain.grad)
        return gradients

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for plain, parameter in self.sharded.items():
            plain.grad = parameter.grad = None


@torch.no_grad()
def local_tensor(tensor: Any) -> Tensor:
    """What this rank holds of a sharded tensor, itself and not a copy."""
    local: Tensor = tensor.to_local()
    return local
