"""One process that takes itself for the first of several, so that it allocates what that one would."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist

# Registers the backend "fake", whose exchanges leave the tensors of other ranks out.
from torch.testing._internal.distributed.fake_pg import FakeStore

from framework.sharding.place import Place
from framework.sharding.ranks import Ranks


class FirstOfAlike(Ranks):
    """Ranks that all say what this one says."""

    def __init__(self, place: Place) -> None:
        self.place, self._group = place, None

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`."""
        return [value] * self.world_size

    def meet(self) -> None:
        """See `Ranks.meet`; nobody is waited for."""

    def _reduced(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        factor = self.world_size if operation == dist.ReduceOp.SUM else 1
        return [float(value) * factor for value in values]


@contextmanager
def first_of(count: int, *, connected: bool = False) -> Iterator[Ranks]:
    """Within this context the process is the first of `count` ranks, as libraries see it, too.

    It must not be a rank of anything already.

    Args:
        count: of the ranks.
        connected: a single rank has a process group, too, as engines for several need one.
    """
    if count == 1 and not connected:
        yield Ranks(Place())
        return
    described = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with mock.patch.dict(os.environ, described | address):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
        try:
            yield FirstOfAlike(Place.of_environment())
        finally:
            dist.destroy_process_group()
