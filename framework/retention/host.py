"""Retained tensors in the host's memory: copied there beside the computation, and fetched back ahead of their use.

What a forward pass keeps is used in the opposite order by its backward pass. So there is never more of it on the device
than of a few blocks, whatever the depth: forward, of the block whose copy goes on beside the next one; backward, of
the block that is replayed and of those that are fetched meanwhile.

On a CUDA device copies run on a stream of their own, into pinned memory that torch's caching host allocator hands out
again at the next step; it rounds each tensor up to a power of two. Memory of the device is freed at a fixed point of
the computation, which waits there for the copy, and never later as the copies happen to end: peaks are the same at
every step. On the CPU both ways are copies into other memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from framework.errors import RunError


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's copies, in both directions: what is fetched was sent before."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Within this context copies go on beside the computation, after what it has been given so far."""
    if device.type != "cuda":
        yield
        return
    stream = copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


@torch.library.custom_op("selectrain::to_host", mutates_args=())
def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in the host's memory, pinned ones of a CUDA device, in the same layout.

    An operator of its own, by which trackers of a device's memory tell the two apart where both are one CPU's.

    Raises:
        RunError: the host does not give the memory.
    """
    try:
        copies = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in tensors)
        raise RunError(
            f'retention.placement: "host" wants {size:,} bytes more of the host, which does not give them ({error}): '
            'retain less, by a smaller micro-batch, retain_linears false or a coarser kv_format, or on the "device"'
        ) from error
    with _beside(tensors[0].device):
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
    return copies


@torch.library.custom_op("selectrain::to_device", mutates_args=())
def to_device(copies: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device again."""
    tensors = [torch.empty_like(copy, device=device) for copy in copies]
    with _beside(device):
        for copy, tensor in zip(copies, tensors, strict=True):
            tensor.copy_(copy, non_blocking=True)
    return tensors


@to_host.register_fake
def _(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


@to_device.register_fake
def _(copies: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    return [torch.empty_like(copy) for copy in copies]


TO_HOST = torch.ops.selectrain.to_host.default
TO_DEVICE = torch.ops.selectrain.to_device.default
"""The two as dispatch modes see them."""


class HostStore:
    """Keeps tensors of one forward pass on the host, to be fetched in the opposite order.

    It knows no more of them than their order: they live as long as whoever wants to fetch them.

    Args:
        ahead: calls of `keep` whose tensors are sent for before they are asked for.
    """

    def __init__(self, ahead: int = 1) -> None:
        self._ahead = ahead
        self._kept: list[weakref.ref[Kept]] = []

    def keep(self, tensors: Sequence[Tensor]) -> Kept:
        """Begin to copy tensors of one device to the host; those of the call before leave the device now.

        Args:
            tensors: one or more. The device's memory is freed if no one else holds them.
        """
        for before in self._last(1):
            before.leave()
        kept = Kept(self, tensors)
        self._kept.append(weakref.ref(kept))
        return kept

    def fetched(self, kept: Kept) -> None:
        """Forget what was fetched, and send for what is wanted after it."""
        self._kept = [other for other in self._kept if other() not in (kept, None)]
        for following in self._last(self._ahead):
            following.start()

    def _last(self, count: int) -> list[Kept]:
        """So many that are wanted next, in that order."""
        found = (reference() for reference in self._kept[: -count - 1 : -1])
        return [kept for kept in found if kept is not None]


class Kept:
    """Tensors that were given to a store together: on the device, on the host, or on their way.

    The newest of a store are on the device still: fetching them copies nothing.
    """

    def __init__(self, store: HostStore, tensors: Sequence[Tensor]) -> None:
        self._store, self._device = store, tensors[0].device
        self._arrived: torch.cuda.Event | None = None
        self._tensors: list[Tensor] | None = [*tensors]
        self._copies = to_host(self._tensors)
        self._copied = self._now()

    def __del__(self) -> None:
        """Tensors that nobody fetches may still be written to: who gets their memory waits."""
        self._wait_for(self._arrived)

    def leave(self) -> None:
        """Free the device's memory; what is computed from here on waits for the copies."""
        self._wait_for(self._copied)
        self._wait_for(self._arrived)
        self._tensors = self._arrived = None

    def start(self) -> None:
        """Send for the tensors, without waiting for them."""
        if self._tensors is None:
            self._tensors = to_device(self._copies, self._device)
            self._arrived = self._now()

    def fetch(self) -> list[Tensor]:
        """The tensors on their device, once."""
        assert self._copies, "what is kept is fetched once"
        self.start()
        self._wait_for(self._arrived)
        tensors, self._tensors, self._copies, self._arrived = self._tensors, None, [], None
        assert tensors is not None
        self._store.fetched(self)
        return tensors

    def _now(self) -> torch.cuda.Event | None:
        """When the copies up to here are made; None where they are already."""
        return copy_stream(self._device).record_event() if self._device.type == "cuda" else None

    def _wait_for(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
