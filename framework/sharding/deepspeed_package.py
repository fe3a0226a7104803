"""DeepSpeed itself: found, made quiet, and kept from leaving anything behind in the process."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from framework.errors import UserError


def deepspeed_package(device: torch.device, options: dict[str, Any]) -> Any:
    """The package, quiet, for this device and without compiling anything.

    Args:
        device: that computes.
        options: DeepSpeed's JSON.

    Raises:
        UserError: it is not installed, or does not support the precision on this device.
    """
    # DeepSpeed chooses its device by what the machine has, and warns where that is none.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise UserError(
            f'sharding.engine: "deepspeed" needs the package deepspeed ({error}): pip install "selectrain[deepspeed]"'
        ) from None
    # DeepSpeed 0.19 calls these names of torch, once an exchange.
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", f".*torch.distributed.{name}. is deprecated", FutureWarning)
    if "log_level" not in options:
        deepspeed.utils.logger.setLevel(logging.ERROR)
    # An operator for exchanges between processes on CPUs, which would be compiled now; gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for key, supported in (("fp16", "is_fp16_supported"), ("bf16", "is_bf16_supported")):
        if options[key]["enabled"] and not getattr(get_accelerator(), supported)():
            raise UserError(
                f"optimizer.precision: DeepSpeed does not support {key} on {device.type}: use another precision, or "
                "sharding.zero_stage 0"
            )
    _forget_closed_connections(deepspeed.utils.groups)
    return deepspeed


def _forget_closed_connections(groups: Any) -> None:
    """Drop the group of all ranks that DeepSpeed keeps, if it is of connections that an earlier run has closed."""
    try:
        if groups._WORLD_GROUP is not None:
            dist.get_process_group_ranks(groups._WORLD_GROUP)
    except KeyError:
        groups._WORLD_GROUP = None


@contextmanager
def linear_restored() -> Iterator[None]:
    """After this context `torch.nn.functional.linear` is what it was before: ZeRO-3 replaces it for good."""
    plain = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = plain


@contextmanager
def linear_of_zero3() -> Iterator[None]:
    """Within this context linears keep a partitioned weight itself for the backward pass, not what was gathered."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    with linear_restored():
        torch.nn.functional.linear = zero3_linear_wrap
        yield


def let_go(engine: Any) -> None:
    """Make DeepSpeed forget an engine and its model, which it would keep for the process's lifetime.

    Args:
        engine: DeepSpeed's, that is not used any more.
    """
    # Hooks on parameters, in which Python cannot see the cycle of references; and names for messages.
    engine.destroy()
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is not None:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        FWD_MODULE_STACK.clear()
        # A cache of the class, whose keys are the coordinator and the model's modules.
        coordinator = type(offload.get_param_coordinator())
        method = getattr(coordinator, f"_{coordinator.__name__}__params_to_release")
        inspect.getclosurevars(method).nonlocals["func"].cache_clear()
