"""How many bytes a step needs: live tensor storage on CPU, the allocator's own counters on CUDA."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from framework.retention.host import TO_DEVICE, TO_HOST


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

    Where gradients of several uses meet, autograd adds one to the other in place, but not while a mode is active
    (`can_accumulate_inplace`, torch/csrc/autograd/input_buffer.cpp): there the sum counts as the summand that it lets
    die.

    Not seen: temporaries inside an operator's kernel, and memory that is not tensor storage. What retention keeps on
    the host does not count, though it is in the same memory here (`to_host`).

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
        # A sum of gradients that is not counted yet, and the keys of its summands.
        self._sum: tuple[weakref.ref[torch.UntypedStorage], set[int]] | None = None
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
        self._settle()
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is TO_HOST:
            self._sent(args[0], result)
            return result
        if func is torch.ops.aten.add.Tensor and _is_sum_of_gradients(sys._getframe(1), args):
            storage = result.untyped_storage()
            summands = {given.untyped_storage()._cdata for given in args}
            if storage._cdata not in self._live and any(self._holds(key, storage.nbytes()) for key in summands):
                self._sum = weakref.ref(storage), summands
                return result
        arguments: set[int] | None = None
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live:
                # A view of, or a write into, a storage that is not ours is not ours either; `lift_fresh` however hands
                # out what `torch.tensor` has just built without an operator.
                if arguments is None:
                    fresh = func is torch.ops.aten.lift_fresh.default
                    inputs = () if fresh else (*tensors_of(args), *tensors_of(tuple(kwargs.values())))
                    arguments = {given.untyped_storage()._cdata for given in inputs}
                if storage._cdata in arguments:
                    continue
            self._count(storage)
        if func is TO_DEVICE:
            self._fetched(args[0], result)
        return result

    def _sent(self, tensors: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
        """Tensors have copies on the host from here on."""

    def _fetched(self, copies: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        """What was on the host is on the device, too."""

    def _holds(self, key: int, size: int) -> bool:
        return key in self._live and self._live[key][1] == size

    def _settle(self) -> None:
        """Count the last sum of gradients by itself, if none of its summands has died."""
        if self._sum is not None:
            storage = self._sum[0]()
            self._sum = None
            if storage is not None:
                self._count(storage)

    def _take_over(self, old: int) -> bool:
        """Let the last sum of gradients be what a dying summand was; whether it is."""
        if self._sum is None or old not in self._sum[1]:
            return False
        storage = self._sum[0]()
        if storage is None or not self._holds(old, storage.nbytes()):
            return False
        self._sum = None
        self._live.pop(old)
        self._live[storage._cdata] = self._watched(storage), storage.nbytes()
        return True

    def _watched(self, storage: torch.UntypedStorage) -> weakref.ref[torch.UntypedStorage]:
        """A reference that tells the tracker when the storage dies."""
        key, owner = storage._cdata, weakref.ref(self)

        def died(_: Any) -> None:
            tracker = owner()
            if tracker is not None and not tracker._take_over(key):
                tracker._change(-tracker._live.pop(key)[1], key)

        return weakref.ref(storage, died)

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage for the first time, or again after its size may have changed."""
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None and known[1] == size:
            return
        reference = self._watched(storage) if known is None else known[0]
        self._live[key] = (reference, size)
        self._change(size if known is None else size - known[1], key)

    def _change(self, size: int, key: int) -> None:
        """More bytes of a storage are live, or fewer."""
        self.current += size
        self.peak = max(self.peak, self.current)


_WRAPPERS = ("/torch/_dynamo/eval_frame.py", "/torch/_compile.py")


def _is_sum_of_gradients(caller: FrameType | None, args: tuple[Any, ...]) -> bool:
    """Whether autograd itself, and no Python code of a backward pass, adds two tensors that are alike."""
    if torch._C._current_graph_task_id() == -1 or len(args) != 2:
        return False
    first, second = args
    if not isinstance(second, torch.Tensor) or first.shape != second.shape or first.dtype != second.dtype:
        return False
    # torch wraps what modes define.
    while caller is not None and caller.f_code.co_filename.endswith(_WRAPPERS):
        caller = caller.f_back
    return caller is not None and caller.f_code.co_name == "_engine_run_backward"


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operator's arguments or results, which nest in lists and tuples only."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
