"""Stored tensors of any engine and number of ranks, for the ranges that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from framework.errors import UserError
from framework.sharding.fragments import StoredTensors
from framework.sharding.zero_stages import Piece

LISTED_NAMES = 8


class StoredNames:
    """Stored weights under the first names of the model's tensors; tied ones may be stored under any of theirs."""

    def __init__(
        self,
        stored: StoredTensors,
        aliases: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        needed: Iterable[str],
    ) -> None:
        """Check names and shapes.

        Args:
            stored: the weights.
            aliases: every name of the model's tensors, and the first of each.
            shapes: by first name.
            needed: first names that must be there.

        Raises:
            UserError: they are not this model's.
        """
        self._stored = stored
        self._places = {aliases[name]: name for name in stored.names() if name in aliases}
        _check(
            "weights",
            missing=[name for name in needed if name not in self._places],
            unexpected=[name for name in stored.names() if name not in aliases],
            other_shape=_other_shapes(stored, {place: shapes[name] for name, place in self._places.items()}),
        )

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Elements of a tensor by its first name."""
        return self._stored.read(self._places[name], start, count)


def load_state(
    optimizer: torch.optim.Optimizer,
    pieces: Sequence[Piece],
    names: Mapping[nn.Parameter, str],
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
    stored: StoredTensors,
) -> None:
    """Make the optimiser's state of stored tensors `STATE.WEIGHT`; what they lack is zero, as before a first step.

    Args:
        optimizer: whose state is replaced.
        pieces: what this rank holds.
        names: first names of the parameters.
        shapes: of trained parameters, by first name.
        aliases: every name of the model's tensors, and the first of each.
        stored: the optimiser's tensors.

    Raises:
        UserError: they do not belong to trained parameters of this model.
    """
    places = {(key, aliases.get(name, name)): f"{key}.{name}" for key, name in _split(stored)}
    tensors = {place: shapes[name] for (_, name), place in places.items() if name in shapes if stored.shape(place)}
    _check(
        "optimiser's tensors",
        missing=[],
        unexpected=[place for (_, name), place in places.items() if name not in shapes],
        other_shape=_other_shapes(stored, tensors),
    )
    optimizer.state.clear()
    fused = {id(p): bool(g.get("fused")) for g in optimizer.param_groups for p in g["params"]}
    everywhere = any(bool(group.get("fused")) for group in optimizer.param_groups)
    for piece in pieces:
        state = optimizer.state[piece.owner]
        for (key, name), place in places.items():
            if name != names[piece.parameter]:
                continue
            if not stored.shape(place):
                # A step counter lives where torch keeps it: on the device for fused updates only.
                on_device = fused.get(id(piece.owner), everywhere)
                state[key] = stored.read(place).reshape(()).to(piece.flat.device if on_device else "cpu", copy=True)
                continue
            if key not in state:
                state[key] = torch.zeros_like(piece.owner, memory_format=torch.contiguous_format, requires_grad=False)
            part = state[key].view(-1)[piece.offset : piece.offset + piece.count]
            part.copy_(stored.read(place, piece.start, piece.count))
        if not state:
            del optimizer.state[piece.owner]


def _split(stored: StoredTensors) -> list[tuple[str, str]]:
    pairs = (name.split(".", 1) for name in stored.names())
    return [(key, name) for key, name in pairs]


def _other_shapes(stored: StoredTensors, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [
        f"{name} {list(stored.shape(name))} in the checkpoint, {list(shape)} in the model"
        for name, shape in shapes.items()
        if tuple(stored.shape(name)) != shape
    ]


def _check(what: str, **findings: list[str]) -> None:
    lines = [f"  {title.replace('_', ' ')}: {_listed(found)}" for title, found in findings.items() if found]
    if lines:
        raise UserError(
            f"the checkpoint's {what} are not those of the configured model; use the `model` section that they were "
            "saved with\n" + "\n".join(lines)
        )


def _listed(entries: list[str]) -> str:
    more = f", and {len(entries) - LISTED_NAMES} more" if len(entries) > LISTED_NAMES else ""
    return ", ".join(entries[:LISTED_NAMES]) + more
