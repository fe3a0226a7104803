"""Recorded operators, and what is asked of operators before they are recorded; see `Deferred`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# What writes all of what it is given, whatever it held.
_FILLS = {"normal_", "uniform_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
_FILLS |= {"zero_", "fill_", "copy_"}
COPY = torch.ops.aten._to_copy.default
"""A copy to another dtype or device."""
SCALARS = (torch.ops.aten.full.default, torch.ops.aten.scalar_tensor.default)
"""What makes a tensor of a number."""


@dataclass(frozen=True)
class View:
    """Where a recorded tensor lies in its storage."""

    storage: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def of(self, whole: Tensor) -> Tensor:
        """The same place in computed storage, which is flat."""
        return whole.view(self.dtype).as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Step:
    """One recorded operator: its arguments with views for recorded tensors, and the storages that it makes or writes.

    `state` is the generator's before a draw, `default` the default dtype.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    makes: tuple[View, ...]
    state: Tensor | None
    default: torch.dtype


def run(step: Step, flat: dict[int, Tensor]) -> None:
    """Repeat a step on computed storages, each of which is kept as a flat tensor of all of its elements."""
    args, kwargs = tree_map(lambda a: a.of(flat[a.storage]) if isinstance(a, View) else a, (step.args, step.kwargs))
    if step.state is not None:
        generator = kwargs.get("generator")
        if generator is None:
            torch.set_rng_state(step.state)
        else:
            kwargs["generator"] = torch.Generator().set_state(step.state)
    default = torch.get_default_dtype()
    torch.set_default_dtype(step.default)
    try:
        result = step.func(*args, **kwargs)
    finally:
        torch.set_default_dtype(default)
    if not step.makes:
        return
    known = {address(whole) for whole in flat.values()}
    fresh = [tensor for tensor in tensors_in(result) if address(tensor) not in known]
    for made, tensor in zip(step.makes, fresh, strict=True):
        if tensor.stride() != made.stride:
            # Some operators (SVD) lay their results out in another way on the meta device.
            tensor = torch.empty_strided(made.size, made.stride, dtype=made.dtype).copy_(tensor)
        flat[made.storage] = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def place(tensor: Tensor) -> View:
    """Where a tensor lies."""
    return View(address(tensor), tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype)


def changes_nothing(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a copy to the CPU would be of what is there already."""
    options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
    return (
        kwargs.get("device") is not None
        and options.pop("dtype", None) in (None, tensor.dtype)
        and not any(options.values())
    )


def fills(func: Any, args: Any) -> bool:
    """Whether an operator overwrites all of the storage of its first argument."""
    whole = args[0].numel() * args[0].element_size() == args[0].untyped_storage().nbytes()
    name = func._schema.name.removeprefix("aten::")
    return name in _FILLS and whole and all(address(t) != address(args[0]) for t in tensors_in(args[1:]))


def draws(func: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def makes_like(func: Any) -> bool:
    """Whether an operator takes shape and dtype of a tensor only."""
    name = func._schema.name.removeprefix("aten::") if isinstance(func, torch._ops.OpOverload) else ""
    return name.endswith("_like") or name.startswith("new_")


def gives_tensors(func: Any) -> bool:
    """Whether tensors are among an operator's results."""
    return any("Tensor" in str(result.type) for result in func._schema.returns)


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes."""
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += tensors_in(value)
    return written


def on_meta(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device, recorded or not."""
    return tensor.device.type == "meta"


def address(tensor: Tensor) -> int:
    """What tells storages apart while they live."""
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in arguments or results."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
