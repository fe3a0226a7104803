"""The processes of a run: which one this is, and how they agree on numbers, flags and small objects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from framework.sharding.place import Place

PATIENCE = timedelta(days=7)
"""How long ranks wait for each other where they do work of very different length."""


class Ranks:
    """What ranks tell each other between forward and backward passes. All methods are called by every rank.

    Messages go through the hosts (gloo) on a group of their own, so that no device is waited for.

    Attributes:
        place: of this process.
    """

    def __init__(self, place: Place | None = None, group: dist.ProcessGroup | None = None) -> None:
        """Without a group: one process that talks to nobody."""
        self.place = place or Place()
        self._group = group
        assert group is not None or self.place.world_size == 1

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.place.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, element by element, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Maxima over all ranks, element by element."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether any rank raises a flag."""
        return self.max([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, a small picklable object, by rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, a small picklable object."""
        if self._group is None:
            return value
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def meet(self) -> None:
        """Wait for all ranks, however long: before it they may have tokenised or downloaded for hours, or not at all.

        A rank that ends meanwhile is noticed at once all the same.
        """
        if self._group is not None:
            dist.monitored_barrier(group=self._group, timeout=PATIENCE)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Within this context a machine's first rank works alone; the others follow and find what it has left."""
        first = self.place.local_rank == 0
        if not first:
            self.meet()
        yield
        if first:
            self.meet()

    def _reduced(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self._group is None:
            return [float(value) for value in values]
        tensor = torch.tensor([*values], dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()


@contextmanager
def joined_ranks(place: Place, *, timeout_seconds: int, needed: bool = True) -> Iterator[Ranks]:
    """Within this context the processes of a launch are connected; connections that exist already are used.

    A rank that waits for the others longer than `timeout_seconds` (`sharding.timeout_seconds`) in one exchange ends
    with an error. After an error the connections are left as they are, to be closed by the end of the process: taking
    them down in order needs the others, which may be gone.

    Within it `LOCAL_RANK` says the place, too, where no launcher has set it: DeepSpeed reads it at any time.

    Args:
        place: of this process.
        timeout_seconds: for every exchange.
        needed: also connect where there is one process only, as sharding engines need.
    """
    if place.world_size == 1 and not needed:
        yield Ranks(place)
        return
    timeout, found = timedelta(seconds=timeout_seconds), dist.is_initialized()
    if not found:
        _connect(place, timeout)
    ranks = Ranks(place, dist.new_group(backend="gloo", timeout=timeout))
    try:
        with _local_rank_said(place):
            yield ranks
        # Whoever leaves first would close connections that others still read from.
        ranks.barrier()
    except BaseException:
        if place.world_size == 1 and not found:
            dist.destroy_process_group()
        raise
    if not found:
        dist.destroy_process_group()


@contextmanager
def _local_rank_said(place: Place) -> Iterator[None]:
    """Say it as launchers do, and no longer than needed: what is in the environment later is taken for a launch."""
    if "LOCAL_RANK" in os.environ:
        yield
        return
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]


def _connect(place: Place, timeout: timedelta) -> None:
    device = place.device()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or does not answer; gloo's have no type of their own."""
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "monitoredBarrier")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
