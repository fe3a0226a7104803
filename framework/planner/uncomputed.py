"""Tensors with sizes and without values: what a step allocates at full size, without its memory or its arithmetic."""

from __future__ import annotations

import functools
import mmap
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_map_only

from framework.models.steps import gives_tensors, makes_like, tensors_in

SMALL = 2**16
"""Elements of the largest float tensor that is computed."""

SMALL_INTEGERS = 2**22
"""Elements of the largest tensor of integers or bools that is computed: selections and masks decide about shapes."""

# Linux refuses an ordinary allocation of more than the machine has; larger ones than this say that they need none.
_MAPPED = 2**32
# From Linux's mman.h; Python's module does not have it.
_MAP_NORESERVE = 0x4000
_META, _CPU = torch.device("meta"), torch.device("cpu")
_OF_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


# torch's dispatch modes are not annotated.
class Uncomputed(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's mode
    """Inside `with Uncomputed():` operators on the CPU give large tensors that nobody writes to.

    They are ordinary CPU tensors of the right shape, strides and dtype, so that libraries see nothing unusual, and
    live and die as those of a real step do. The operating system gives a tensor memory page by page, where it is
    written, so that these take next to none. What is known is computed: small tensors, and integers and bools.
    Whatever is computed from large floats is not known, and comes out large as it is, or small as ones, so that losses
    and norms are finite. Exchanges between ranks leave large tensors as they are; use it with `first_of`.

    A value that decides about a shape must be known: others are refused. Shapes, strides and dtypes are those of
    torch's meta kernels, which for a layer norm in 16 bits have statistics in float32, as on CUDA; the CPU has them in
    16 bits.

    Args:
        small: elements of the largest float tensor that is computed.
    """

    def __init__(self, small: int = SMALL) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor is it
        self._small = small
        self._unknown: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._shapes: dict[Any, _Shapes] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or give its results without values."""
        kwargs = kwargs or {}
        if any(map(is_traceable_wrapper_subclass_type, types)):
            # Tensors made of others, such as DTensor: their operators on what they are made of come here, too.
            return NotImplemented
        kind = _kind(func)
        if kind.views:
            return func(*args, **kwargs)
        given = _tensors((args, *kwargs.values()))
        asked = kwargs.get("device") or _CPU
        if asked.type != "cpu" or not all(tensor.is_cpu for tensor in given):
            return func(*args, **kwargs)
        unknown = not kind.makes_like and any(map(self._is_unknown, given))
        if kind.exchanges:
            return self._exchange(func, args, kwargs) if unknown else func(*args, **kwargs)
        if kind.writes:
            written = _tensors([args[at] if at < len(args) else kwargs.get(name) for at, name in kind.writes])
            if unknown or any(map(self._is_large, written)):
                self._lose(written)
                return _as_returned(func, args, kwargs)
            return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], self._integers(args[1]))
        elif kind.of_values:
            return self._value(func, args) if unknown else func(*args, **kwargs)
        return self._results(func, args, kwargs, unknown)

    def _results(self, func: Any, args: Any, kwargs: Any, unknown: bool) -> Any:
        key = (func, _key(args), *((name, _key(value)) for name, value in kwargs.items()))
        shapes = self._shapes.get(key)
        if shapes is None:
            shapes = self._shapes[key] = _shapes(func, args, kwargs, self._is_large)
        if not unknown and not shapes.large:
            return func(*args, **kwargs)
        given = _tensors((args, *kwargs.values()))

        def result(shape: Tensor) -> Tensor:
            source = shapes.sources.get(id(shape))
            if source is None:
                return self._made(shape)
            # A view that the operator's schema does not call one.
            start = given[source].storage_offset() + shape.storage_offset()
            return given[source].as_strided(shape.size(), shape.stride(), start)

        return result(shapes.tree) if isinstance(shapes.tree, Tensor) else tree_map_only(Tensor, result, shapes.tree)

    def _made(self, shape: Tensor) -> Tensor:
        made = _like(shape, _CPU)
        if not self._is_large(shape):
            return made.fill_(1)
        self._forget(made)
        return made

    def _is_large(self, tensor: Tensor) -> bool:
        return tensor.numel() > (self._small if tensor.is_floating_point() else SMALL_INTEGERS)

    def _is_unknown(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._unknown

    def _forget(self, tensor: Tensor) -> None:
        """From here on a tensor's values, and those of its views, are not known."""
        storage = tensor.untyped_storage()
        key, unknown = storage._cdata, self._unknown
        self._unknown[key] = weakref.ref(storage, lambda _: unknown.pop(key, None))

    def _lose(self, written: Iterable[Tensor]) -> None:
        """Make of tensors what a writing operator leaves that is not run."""
        for tensor in written:
            if self._is_unknown(tensor):
                continue
            if self._is_large(tensor):
                self._forget(tensor)
            else:
                tensor.fill_(1)

    def _integers(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Masks among indices as the integers that they stand for."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
            elif self._is_unknown(index):
                raise _refused(torch.ops.aten.index.Tensor)
            else:
                found += index.nonzero().unbind(1)
        return found

    def _value(self, func: Any, args: Any) -> Any:
        """What an operator says of unknown values: that they are ones, and like no others."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.equal.default:
            return False
        raise _refused(func)

    def _exchange(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An exchange of nothing, in place of one that would write into large tensors."""
        empty = tree_map_only(Tensor, lambda tensor: tensor.new_empty(0), args)
        result = func(*empty, **kwargs)
        self._lose(_tensors(args[0]))
        return (args[0], *result[1:]) if isinstance(result, tuple) else result


@dataclass(frozen=True)
class _Kind:
    """What is to be known of an operator."""

    exchanges: bool
    views: bool
    makes_like: bool
    of_values: bool
    # Of arguments: position and name.
    writes: tuple[tuple[int, str], ...]


@functools.cache
def _kind(func: Any) -> _Kind:
    aliases = [(argument.alias_info, at, argument.name) for at, argument in enumerate(func._schema.arguments)]
    return _Kind(
        exchanges=func.namespace == "c10d",
        views=func.is_view or torch.Tag.inplace_view in func.tags,
        makes_like=makes_like(func),
        of_values=not gives_tensors(func) or any(tag in func.tags for tag in _OF_VALUES),
        writes=tuple((at, name) for alias, at, name in aliases if alias is not None and alias.is_write),
    )


@dataclass(frozen=True)
class _Shapes:
    """What an operator gives: tensors of the meta device, and which of them are views of what given tensor."""

    tree: Any
    sources: dict[int, int]
    large: bool


def _shapes(func: Any, args: Any, kwargs: Any, is_large: Callable[[Tensor], bool]) -> _Shapes:
    given = _tensors((args, *kwargs.values()))
    empty = {id(tensor): _like(tensor, _META) for tensor in given}
    args, kwargs = tree_map_only(Tensor, lambda tensor: empty[id(tensor)], (args, kwargs))
    if "generator" in kwargs:
        kwargs["generator"] = None
    if "device" in kwargs or not given:
        kwargs["device"] = _META
    tree = func(*args, **kwargs)
    made = tensors_in(tree)
    storages = {empty[id(tensor)].untyped_storage()._cdata: number for number, tensor in enumerate(given)}
    places = {id(shape): shape.untyped_storage()._cdata for shape in made}
    sources = {number: storages[storage] for number, storage in places.items() if storage in storages}
    return _Shapes(tree, sources, any(map(is_large, made)))


def _refused(func: Any) -> NotImplementedError:
    # Torch's own type for what a tensor without values cannot do.
    return NotImplementedError(f"{func} depends on values that are not computed")


def _as_returned(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator that writes its arguments returns: these."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    by_alias = {
        alias: named[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.name in named
        for alias in argument.alias_info.before_set
    }
    results = [by_alias[alias] for result in func._schema.returns for alias in result.alias_info.before_set]
    return None if not results else results[0] if len(results) == 1 else tuple(results)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an operator's arguments, which nest in lists and tuples only."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, list | tuple):
                found += _tensors(item)
    return found


def _key(value: Any) -> Any:
    """What shapes depend on of an argument."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same shape, strides and dtype without values."""
    size, stride, dtype = tensor.size(), tensor.stride(), tensor.dtype
    needed = 0
    if device is _CPU and tensor.numel() * tensor.element_size() > _MAPPED // 2:
        needed = (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))) * dtype.itemsize
    if needed < _MAPPED:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)
    memory = mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).as_strided(size, stride)
