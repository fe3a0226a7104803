"""How many bytes a step needs: live tensor storage on CPU, the allocator's own counters on CUDA."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DevicePeak(NamedTuple):
    """Peak bytes of a CUDA device since the last reset: in live tensors, and held by the caching allocator."""

    allocated: int
    reserved: int


def device_peak_memory(device: torch.device) -> DevicePeak | None:
    """Peak bytes since `reset_device_peak`; None on a device whose allocator keeps no count (CPU)."""
    if device.type != "cuda":
        return None
    return DevicePeak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def reset_device_peak(device: torch.device) -> None:
    """Start a new peak at what is allocated now. Does nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class CpuMemoryTracker(TorchDispatchMode):
    """Bytes in live tensor storages, as seen by a dispatch mode.

    Inside `with tracker:` every storage that an operator creates is counted once, whatever views share it, from the end
    of the operator until the storage dies (also after the block has ended). Storages that existed before count only if
    `track` names them. Autograd restores the mode for backward passes, nested and recomputed ones included.

    Not seen: temporaries inside an operator's kernel, and memory that is not tensor storage.

    Attributes:
        current: bytes live now.
        peak: largest `current` since the start or `reset_peak`.
    """

    def __init__(self) -> None:
        """Count nothing yet."""
        super().__init__()
        self.current = 0
        self.peak = 0
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._storage_resize: list[Callable[..., Any]] = []

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of tensors that exist already, such as parameters and optimiser state."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def reset_peak(self) -> None:
        """Start a new peak at what is live now."""
        self.peak = self.current

    def __enter__(self) -> CpuMemoryTracker:
        """Start to see operators; also resizes of bare storages, which no operator announces."""
        plain_resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain_resize(storage, size)
            if storage._cdata in self._live:
                self._count(storage)
            return result

        self._storage_resize.append(plain_resize)
        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Stop to see operators; what is counted stays counted until it dies."""
        torch.UntypedStorage.resize_ = self._storage_resize.pop()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it created."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        arguments: set[int] | None = None
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live:
                # A view of, or a write into, a storage that is not ours is not ours either; `lift_fresh` however hands
                # out what `torch.tensor` has just built without an operator.
                if arguments is None:
                    fresh = func is torch.ops.aten.lift_fresh.default
                    inputs = () if fresh else (*_tensors(args), *_tensors(tuple(kwargs.values())))
                    arguments = {given.untyped_storage()._cdata for given in inputs}
                if storage._cdata in arguments:
                    continue
            self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage for the first time, or again after its size may have changed."""
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None and known[1] == size:
            return
        if known is None:
            owner = weakref.ref(self)

            def died(_: Any) -> None:
                tracker = owner()
                if tracker is not None:
                    tracker._change(-tracker._live.pop(key)[1], key)

            reference = weakref.ref(storage, died)
        else:
            reference = known[0]
        self._live[key] = (reference, size)
        self._change(size if known is None else size - known[1], key)

    def _change(self, size: int, key: int) -> None:
        """More bytes of a storage are live, or fewer."""
        self.current += size
        self.peak = max(self.peak, self.current)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operator's arguments or results, which nest in lists and tuples only."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
