"""A model's tensors on their way into DeepSpeed: from the meta device or the host, one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import RunError
from framework.sharding.protocol import InitialTensors

Masters = dict[nn.Parameter, Tensor]
"""The float32 values of trainable parameters that their 16-bit copies would lose, on the host, flat: whole ones, or
this rank's partition where parameters are partitioned."""


def fill(model: nn.Module, initial: InitialTensors | None, take: Callable[[nn.Parameter], None]) -> None:
    """Give a model its missing tensors, and hand every parameter on as soon as it has a value.

    A parameter stays the same object, which an optimiser may already hold.

    Args:
        model: with weights, or with tensors on the meta device.
        initial: of those: names and values, see `Engine.prepare`.
        take: is called once with every parameter, in the order of `initial` and then of the model.
    """
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    taken: set[nn.Parameter] = set()
    for name, value in initial or ():
        tensor = tensors[name]
        if not tensor.is_meta:
            continue  # a tied one, known under another name
        _materialise(tensor, value)
        if isinstance(tensor, nn.Parameter):
            taken.add(tensor)
            take(tensor)
    missing = [name for name, tensor in tensors.items() if tensor.is_meta]
    if missing:
        raise RunError(f"the model has no value for {', '.join(missing[:5])}")
    for parameter in model.parameters():
        if parameter not in taken:
            take(parameter)


def _materialise(tensor: Tensor, value: Tensor) -> None:
    """Put a value into a tensor on the meta device that keeps its identity and attributes."""
    value = value.to(tensor.dtype, copy=True)
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    vars(value).update(vars(tensor))
    torch.utils.swap_tensors(tensor, value)


class Partitioner:
    """Hands parameters to ZeRO-3 one by one: on the device whole, then this rank's partition of it.

    Attributes:
        masters: what is lost in 16 bits, see `Masters`.
    """

    def __init__(self, zero: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
        """Prepare it.

        Args:
            zero: the module `deepspeed.zero`.
            options: DeepSpeed's JSON.
            dtype: that weights are held in.
        """
        self.masters: Masters = {}
        self._dtype = dtype
        self._init = zero.Init(module=nn.Module(), config_dict_or_path=copy.deepcopy(options), dtype=dtype)

    def __call__(self, parameter: nn.Parameter) -> None:
        """Partition a parameter; all ranks do so in the same order."""
        exact = parameter.data
        parameter.data = _cast(parameter.data, self._dtype)
        lost = _lost(parameter, exact)
        self._init._convert_to_zero_parameters([parameter])
        if lost:
            (start, count) = partition_range(parameter)
            self.masters[parameter] = exact.reshape(-1)[start : start + count].to("cpu", copy=True)


def partition_range(parameter: nn.Parameter) -> tuple[int, int]:
    """First element and number of elements of this rank's partition of a ZeRO-3 parameter, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = size * parameter.ds_zero_partition_rank
    return start, max(0, min(size, parameter.ds_numel - start))


def whole_masters(parameters: Iterator[nn.Parameter], dtype: torch.dtype, masters: Masters) -> None:
    """Keep what trainable parameters lose when DeepSpeed casts them to `dtype`."""
    for parameter in parameters:
        exact = parameter.data
        if parameter.requires_grad and exact.is_floating_point() and not torch.equal(exact, exact.to(dtype)):
            masters[parameter] = exact.reshape(-1).to("cpu", copy=True)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _lost(parameter: nn.Parameter, exact: Tensor) -> bool:
    """Whether a trainable parameter is not in 16 bits what it was."""
    return parameter.requires_grad and not torch.equal(parameter.data.to(exact.dtype), exact)
