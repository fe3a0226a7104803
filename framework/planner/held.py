"""What of a model an engine holds: its weights one by one. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import ceil


# Compared as the object that it is, since models of engines look weights up all the time.
@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter.

    Attributes:
        name: in the model, or within its block.
        block: index of its block; None outside.
        elements: of the whole.
        itemsize: bytes of an element, as the model is built.
        group: index of the optimiser's group that it is in; None if it is frozen.
        rows: its first dimension, 1 for a scalar.
    """

    name: str
    block: int | None
    elements: int
    itemsize: int
    group: int | None
    rows: int

    @property
    def bytes(self) -> int:
        """Of the whole, as the model is built; of its gradient, too."""
        return self.elements * self.itemsize

    @property
    def trained(self) -> bool:
        """Whether it has a gradient."""
        return self.group is not None

    @property
    def packed(self) -> bool:
        """Whether it is bytes of a quantised matrix, which no change of precision alters."""
        return self.itemsize == 1

    def as_wide(self, width: int) -> int:
        """Bytes of the whole, where elements of weights have this width."""
        return self.elements * (1 if self.packed else width)

    def shard(self, count: int) -> int:
        """Elements of the largest of so many parts that its rows are shared out to."""
        return ceil(self.rows / count) * (self.elements // self.rows)


@dataclass(frozen=True)
class Weights:
    """All parameters of a model, tied ones once, in its order.

    Attributes:
        all: of the model.
        buffers: bytes of its buffers.
    """

    all: tuple[Weight, ...]
    buffers: int

    @cached_property
    def by_name(self) -> dict[tuple[str, int | None], Weight]:
        """By name and block."""
        return {(weight.name, weight.block): weight for weight in self.all}

    @cached_property
    def by_module(self) -> dict[tuple[str, int | None], tuple[Weight, ...]]:
        """The parameters that a module has itself, by its name and block."""
        found: dict[tuple[str, int | None], list[Weight]] = {}
        for weight in self.all:
            found.setdefault((weight.name.rpartition(".")[0], weight.block), []).append(weight)
        return {module: tuple(own) for module, own in found.items()}

    @cached_property
    def groups(self) -> tuple[tuple[Weight, ...], ...]:
        """The trained ones, by the optimiser's groups."""
        trained = sorted((weight for weight in self.all if weight.trained), key=lambda weight: weight.group or 0)
        return tuple(tuple(members) for _, members in groupby(trained, key=lambda weight: weight.group))

    @cached_property
    def elements(self) -> int:
        """Of all but packed ones."""
        return sum(weight.elements for weight in self.all if not weight.packed)

    def as_wide(self, width: int) -> int:
        """Bytes of all, where elements of weights have this width."""
        return sum(weight.as_wide(width) for weight in self.all)

    @cached_property
    def trained(self) -> int:
        """Elements of the trained ones."""
        return sum(weight.elements for weight in self.all if weight.trained)
