"""Tensors that are recorded now and computed later, one by one: how a model is built without room for all of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from framework.models.steps import (
    COPY,
    SCALARS,
    Step,
    View,
    address,
    changes_nothing,
    draws,
    fills,
    gives_tensors,
    makes_like,
    on_meta,
    place,
    run,
    tensors_in,
    written_by,
)

_CPU = torch.device("cpu")
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class Deferred(TorchDispatchMode):
    """Inside `with deferred:`, large tensors on the CPU are recorded instead of computed.

    A factory's tensor of at least `smallest` elements lives on the meta device, though it says that it is on the CPU,
    and so does what operators make of it; every operator that makes or writes one is written down, a draw with the
    state of the CPU's generator, which moves on as by the draw itself. `value` repeats what one tensor needs, in the
    recorded order, so that it gets the same bits. Smaller tensors are computed at once, as is what Python asks of
    values (`bool(tensor)`, `torch.equal`).

    Memory: recording holds one drawn tensor at a time; `value` holds the tensor that it computes and what one of the
    operators on the way to it takes and gives.
    """

    def __init__(self, *, smallest: int) -> None:
        """Record nothing yet.

        Args:
            smallest: elements of the smallest tensor that is recorded.
        """
        super().__init__()
        self._smallest = smallest
        # Also keeps each storage alive, so that no other one gets its address.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._steps: list[Step] = []
        self._written_by: defaultdict[int, list[int]] = defaultdict(list)
        self._last_read: dict[int, int] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._functions = _OnTheCpu(self)

    def __enter__(self) -> Deferred:
        """Start to record."""
        super().__enter__()
        self._functions.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop to record; `value` works still."""
        self._functions.__exit__(*exception)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        super().__exit__(*exception)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is recorded and not computed."""
        return address(tensor) in self._storages

    def source(self, read: Callable[[], Tensor], size: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A recorded tensor whose values `read` gives whenever they are needed.

        Args:
            read: gives a dense CPU tensor of `size` and `dtype`, always the same.
            size: of the tensor.
            dtype: of the tensor.
        """
        with torch._C.DisableTorchFunction():
            tensor = torch.empty(tuple(size), dtype=dtype, device="meta")
            self._add(read, (), {}, made=[tensor])
        return tensor

    def value(self, tensor: Tensor) -> Tensor:
        """The values of a recorded tensor, `[*tensor.shape]` on the CPU, computed anew at each call.

        The process's random state is left as it was.
        """
        with torch._C.DisableTorchFunction(), torch.random.fork_rng(devices=[]), torch.no_grad():
            (computed,) = self._values([tensor])
        return computed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or write it down."""
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = list(tensors_in((args, kwargs)))
        if not any(self.holds(tensor) for tensor in given):
            return self._first(func, args, kwargs, given)
        written = written_by(func, args, kwargs)
        if func is COPY and changes_nothing(args[0], kwargs):
            return torch.ops.aten.alias.default(args[0])
        if not gives_tensors(func) or any(not self.holds(tensor) for tensor in written):
            return self._at_once(func, args, kwargs)
        if (
            draws(func)
            and not makes_like(func)
            and any(self.holds(t) and all(t is not w for w in written) for t in given)
        ):
            # How much is drawn may depend on the values (`multinomial`).
            return self._at_once(func, args, kwargs)
        state = self._advance(func, args, kwargs)
        try:
            result = func(*tree_map(_shape_only, args), **_on_meta(tree_map(_shape_only, kwargs)))
        except NotImplementedError:
            # Operators whose shape depends on values, such as `nonzero`.
            return self._at_once(func, args, kwargs)
        made = [t for t in tensors_in(result) if not self.holds(t)]
        if written or made:
            self._add(func, args, kwargs, made=made, written=written, state=state)
        return result

    def _first(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """An operator on computed tensors only: recorded if it is a factory of a large tensor on the CPU."""
        device = kwargs.get("device")
        if device is not None and device.type == "meta" and (func in SCALARS or func is COPY):
            return self._follow(func, args, kwargs)
        takes_device = any(argument.name == "device" for argument in func._schema.arguments)
        if not takes_device or (device or _CPU).type != "cpu" or not all(on_meta(t) for t in given):
            return func(*args, **kwargs)
        if given and device is None:
            return func(*args, **kwargs)
        empty = func(*args, **{**kwargs, "device": torch.device("meta")})
        if not isinstance(empty, Tensor) or empty.numel() < self._smallest:
            return func(*args, **kwargs)
        self._add(func, args, kwargs, made=[empty], state=self._advance(func, args, kwargs))
        return empty

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A number or an index that PyTorch moves to the device of the recorded tensor which it is for."""
        empty: Tensor = func(*args, **kwargs)
        if on_meta(args[0]) if func is COPY else empty.dim() > 0:
            return empty
        value = func(*args, **{**kwargs, "device": _CPU}).detach().clone()
        return self.source(value.clone, value.shape, value.dtype)

    def _at_once(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator on computed values; of recorded tensors it may only read."""
        if any(self.holds(tensor) for tensor in written_by(func, args, kwargs)):
            # Torch's own error for what a tensor without values cannot do: `sharded_model` answers it.
            raise NotImplementedError(f"{func} cannot be recorded: it writes what depends on values")
        held = [tensor for tensor in tensors_in((args, kwargs)) if self.holds(tensor)]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            computed = dict(zip(map(id, held), self._values(held), strict=True))
        args, kwargs = tree_map(lambda value: computed.get(id(value), value), (tuple(args), kwargs))
        return func(*args, **kwargs)

    def _add(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        *,
        made: list[Tensor],
        written: list[Tensor] | None = None,
        state: Tensor | None = None,
    ) -> None:
        """Write a step down, and forget earlier ones on a storage that it fills whole."""
        if not makes_like(func) and any(on_meta(t) and not self.holds(t) for t in tensors_in((args, kwargs))):
            # Torch's own error again, as in `_at_once`.
            raise NotImplementedError(f"{func} on a tensor of the meta device, whose values nobody has recorded")
        # An operator on recorded tensors may name the meta device too (`type_as`).
        on_cpu = {name: _CPU if name == "device" and value is not None else value for name, value in kwargs.items()}
        views = tree_map(self._view, (tuple(args), on_cpu))
        reads = frozenset(view.storage for view in _views(views))
        for tensor in made:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage
        index = len(self._steps)
        if written and fills(func, args):
            self._forget(address(args[0]))
        makes = tuple(map(place, made))
        self._steps.append(Step(func, *views, reads, makes, state, torch.get_default_dtype()))
        own = {address(tensor) for tensor in [*made, *(written or [])]}
        self._last_read.update(dict.fromkeys(reads - own, index))
        for storage in own:
            self._written_by[storage].append(index)

    def _forget(self, storage: int) -> None:
        """Drop what was written to a storage and never read, but not the step that made it."""
        made, *later = self._written_by[storage]
        read = self._last_read.get(storage, -1)
        self._written_by[storage] = [made, *(index for index in later if index < read)]

    def _view(self, value: Any) -> Any:
        """What a step keeps of an argument: of a computed tensor a copy, since it may be written later."""
        if not isinstance(value, Tensor):
            return value
        if self.holds(value):
            return place(value)
        return value if on_meta(value) else value.detach().clone()

    def _advance(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """The generator's state before a draw, and the generator moved on as by the draw."""
        if not draws(func):
            return None
        generator = kwargs.get("generator") or torch.default_generator
        state = generator.get_state()
        func(*tree_map(self._room, args), **tree_map(self._room, kwargs))
        return state

    def _room(self, value: Any) -> Any:
        """Room like a recorded tensor's, always the same: what is kept between draws would break up the free memory."""
        if not isinstance(value, Tensor) or not on_meta(value):
            return value
        size = value.untyped_storage().nbytes()
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size].view(value.dtype).as_strided(value.size(), value.stride(), value.storage_offset())

    def _values(self, tensors: list[Tensor]) -> list[Tensor]:
        wanted = {address(tensor) for tensor in tensors}
        needed = self._needed(wanted)
        last = {}
        for index in needed:
            step = self._steps[index]
            last.update(dict.fromkeys((*step.reads, *(made.storage for made in step.makes)), index))
        flat: dict[int, Tensor] = {}
        for index in needed:
            run(self._steps[index], flat)
            for storage in [s for s in flat if last[s] == index and s not in wanted]:
                del flat[storage]
        return [self._view(tensor).of(flat[address(tensor)]) for tensor in tensors]

    def _needed(self, storages: set[int]) -> list[int]:
        """The steps that lead to the last state of storages, in order."""
        needed: set[int] = set()
        pending = [(storage, len(self._steps)) for storage in storages]
        while pending:
            storage, end = pending.pop()
            for index in self._written_by[storage]:
                if index < end and index not in needed:
                    needed.add(index)
                    pending += [(read, index) for read in self._steps[index].reads]
        return sorted(needed)


class _OnTheCpu(TorchFunctionMode):
    """Lets recorded tensors say that they are on the CPU, where their values will be."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred
        self._answers = {
            torch.Tensor.device.__get__: _CPU,
            torch.Tensor.is_meta.__get__: False,
            torch.Tensor.is_cpu.__get__: True,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._answers and self._deferred.holds(args[0]):
            return self._answers[func]
        if func in _INDEXING and self._deferred.holds(args[0]):
            # PyTorch would make tensors of lists on the meta device, and lose them.
            args = (args[0], _as_tensors(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def _as_tensors(index: Any) -> Any:
    """An index with tensors for lists."""
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    if isinstance(index, list):
        return torch.tensor(index) if index else torch.empty(0, dtype=torch.long)
    return index


def _shape_only(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not on_meta(value) else value


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("meta")} if kwargs.get("device") is not None else kwargs


def _views(value: Any) -> Iterable[View]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, View)]
