"""One CPU as device and host: what an engine offloads is told from what is on the device.

To torch `cpu` and `cpu:0` are one device, but operators that are given one of them by name say which. So the device
is `cpu:0` here wherever an engine names it, and `cpu` is the host: what is made by name is where it says, and what is
made of other tensors is where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from framework.config import Config
from framework.planner.recorder import Recorder
from framework.sharding.fsdp import FsdpEngine
from framework.sharding.local_shards import local_tensor
from framework.sharding.zero_stages import PartitionedParameters
from framework.training.memory import tensors_of

DEVICE = torch.device("cpu", 0)


# torch's dispatch modes are not annotated.
class HostRecorder(Recorder):  # type: ignore[no-untyped-call]  # as its base
    """A recorder that counts by itself what an engine has on the host, too: by the rule above, or by `on_host`."""

    def __init__(self) -> None:
        """Nothing is on the host yet."""
        super().__init__()
        self._made_on_host = False

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._host:
            return
        if self._made_on_host and storage._cdata not in self._live:
            self._add_to_host(storage)
        else:
            super()._count(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `CpuMemoryTracker`."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and self._is_no_copy(args[0], kwargs):
            return args[0].view_as(args[0])
        self._made_on_host = self._at_work > 0 and self._is_for_host(args, kwargs)
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._made_on_host = False

    def _is_no_copy(self, tensor: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether `.to(DEVICE)` would give the tensor itself, if it knew that it is there."""
        alike = kwargs.get("dtype") in (None, tensor.dtype)
        return kwargs.get("device") == DEVICE and alike and not self.is_on_host(tensor)

    def _is_for_host(self, args: Any, kwargs: dict[str, Any]) -> bool:
        if kwargs.get("device") is not None:
            return torch.device(kwargs["device"]).index is None
        given = [*tensors_of(args), *tensors_of(tuple(kwargs.values()))]
        return all(map(self.is_on_host, given))


@contextmanager
def offloading(config: Config, recorder: HostRecorder) -> Iterator[None]:
    """Within this context an engine that is built calls the device `DEVICE`, and the recorder sees what it moves.

    Args:
        config: of the run.
        recorder: of its steps.
    """
    with ExitStack() as stack:
        for context in _fsdp(recorder) if config.sharding.engine == "fsdp" else _deepspeed(recorder):
            stack.enter_context(context)
        yield


def _fsdp(recorder: HostRecorder) -> Iterator[AbstractContextManager[Any]]:
    place, update = FSDPParam.to_sharded_dtensor, FsdpEngine.step

    def placed(self: FSDPParam, tensor: Tensor) -> Any:
        """Gradients have been on a device, and are copied to the host by now."""
        if not recorder.parts:
            return place(self, tensor)
        with recorder.at_work():
            return place(self, torch.empty_like(tensor, device=torch.device("cpu")).copy_(tensor))

    def step(self: FsdpEngine, **arguments: Any) -> Any:
        with recorder.at_work():
            return update(self, **arguments)

    yield mock.patch.object(_fully_shard, "_get_device_from_mesh", lambda mesh: DEVICE)
    yield mock.patch.object(FSDPParam, "to_sharded_dtensor", placed)
    yield mock.patch.object(FsdpEngine, "step", step)


def _deepspeed(recorder: HostRecorder) -> Iterator[AbstractContextManager[Any]]:
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    yield mock.patch.object(accelerator, "current_device_name", lambda self: str(DEVICE))
    yield mock.patch.object(accelerator, "device_name", lambda self, index=None: str(DEVICE))
    yield mock.patch.object(accelerator, "on_accelerator", lambda self, tensor: not recorder.is_on_host(tensor))


def offloaded(engine: Any) -> Iterator[Tensor]:
    """What a prepared engine has on the host between steps."""
    state = engine.held().optimizer
    if isinstance(engine, FsdpEngine):
        yield from (*state, *map(local_tensor, engine.model.parameters()))
        return
    zero = engine._engine.optimizer
    if not isinstance(engine._holder, PartitionedParameters):
        yield from (*state, *_with_gradients(zero.single_partition_of_fp32_groups))
        yield from (zero.temp_grad_buffer_for_cpu_offload, *zero.param_buffer_of_bit16_for_cpu_offload_groups)
        return
    if zero.offload_optimizer:
        yield from (*state, zero.grad_partitions_flat_buffer, *_with_gradients(zero.fp32_partitioned_groups_flat))
    if zero.offload_param:
        yield from (p.ds_tensor for p in engine.model.parameters() if p.requires_grad or not p.ds_persist)


def _with_gradients(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield tensor
        if tensor.grad is not None:
            yield tensor.grad
