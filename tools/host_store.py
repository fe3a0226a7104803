"""Tensors in pinned host memory: copied there beside the computation, and fetched back one ahead of their use.

What a forward pass keeps is used in the opposite order by its backward pass, so whoever fetches one kept tensor wants
the one kept before it next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HostStore:
    """Keeps tensors of one device on the host, last in first out.

    On a CUDA device copies run on a stream of their own. On the CPU tensors stay as they are.

    Args:
        ahead: tensors that are fetched before they are asked for.
    """

    def __init__(self, ahead: int = 2) -> None:
        self._ahead = ahead
        self._kept: list[Kept] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def keep(self, tensor: Tensor) -> Kept:
        """Copy a tensor to the host; its device memory is free once the copy is done and no one else holds it."""
        kept = Kept(self, tensor)
        self._kept.append(kept)
        return kept

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of the copies from and to a device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def fetched(self, kept: Kept) -> None:
        """Forget a tensor that is on its way, and send for those that are wanted after it."""
        while self._kept and self._kept[-1].started:
            self._kept.pop()
        if kept in self._kept:
            self._kept.remove(kept)
        for following in self._kept[-self._ahead :][::-1]:
            following.start()


class Kept:
    """A tensor on the host."""

    def __init__(self, store: HostStore, tensor: Tensor) -> None:
        self._store, self._device = store, tensor.device
        self.started = False
        self._fetched: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            stream = store.stream(tensor.device)
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                self._host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)

    def start(self) -> None:
        """Send for the tensor, without waiting for it."""
        if self.started:
            return
        self.started = True
        self._fetched = self._host
        if self._device.type == "cuda":
            stream = self._store.stream(self._device)
            self._fetched = torch.empty_like(self._host, device=self._device)
            # The memory may be that of a tensor which the computation has not finished with.
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                self._fetched.copy_(self._host, non_blocking=True)
                self._arrived = stream.record_event()
            self._fetched.record_stream(stream)

    def fetch(self) -> Tensor:
        """The tensor on its device, once."""
        self.start()
        self._store.fetched(self)
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
        tensor, self._fetched = self._fetched, None
        assert tensor is not None, "a kept tensor is fetched once"
        return tensor


def kept_on_host(store: HostStore, wanted: Callable[[Tensor], bool]) -> torch.autograd.graph.saved_tensors_hooks:
    """Within this context what autograd saves is kept on the host, where `wanted` says so."""

    def pack(tensor: Tensor) -> Any:
        return store.keep(tensor) if wanted(tensor) else tensor

    def unpack(kept: Any) -> Tensor:
        return kept.fetch() if isinstance(kept, Kept) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
