"""What FSDP2 lacks in torch 2.11 and 2.12: integers kept under mixed precision, and gradients for all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

FILLS_GRADIENTS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def keep_integers(model: nn.Module) -> None:
    """Gather integer parameters as they are, not in the dtype of mixed precision; from torch 2.12 on its own way."""
    for group in _groups(model):
        for parameter in group.fsdp_params:
            if not parameter.sharded_param.is_floating_point():
                parameter.init_dtype_attrs = _without_cast(parameter.init_dtype_attrs)


def fill_gradients(model: nn.Module) -> None:
    """Reduce gradients of zeros for parameters without one: torch 2.13's `set_reduce_scatter_unused_params(True)`.

    So all ranks exchange the same tensors whatever their data.
    """
    for group in _groups(model):
        group.post_backward = _after_filling(group)


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
            yield group


def _without_cast(init: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda policy: init(replace(policy, param_dtype=None))


def _after_filling(group: Any) -> Callable[..., None]:
    plain = group.post_backward

    def post_backward(*unused: Any) -> None:
        for parameter in group.fsdp_params:
            # Set by the first gathering.
            unsharded = vars(parameter).get("_unsharded_param")
            if unsharded is not None and unsharded.requires_grad and unsharded.grad is None:
                unsharded.grad = torch.zeros_like(unsharded)
        plain(*unused)

    return post_backward
