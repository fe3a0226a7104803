"""Stored tensors of any engine and number of ranks, for the ranges that this rank holds of what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import UserError
from framework.sharding.fragments import StoredTensors
from framework.sharding.weight_names import WeightNames
from framework.sharding.zero_stages import Piece

_LISTED = 5


def state_of(optimizer: torch.optim.Optimizer, owner: Tensor) -> Mapping[str, Any]:
    """The state of a tensor that the optimiser updates, in which every tensor is a scalar or has the shape of that.

    An optimiser whose state is of another kind has a method `exported_state` that gives copies.
    """
    exported = getattr(optimizer, "exported_state", None)
    return optimizer.state.get(owner, {}) if exported is None else exported(owner)


def load_state(
    optimizer: torch.optim.Optimizer,
    pieces: Iterable[Piece],
    names: Mapping[nn.Parameter, str],
    weights: WeightNames,
    stored: StoredTensors,
) -> None:
    """Make the optimiser's state of stored tensors `STATE.WEIGHT`; what they lack is zero, as before a first step.

    Args:
        optimizer: whose state is replaced.
        pieces: what this rank holds.
        names: first names of the trained parameters.
        weights: of the model.
        stored: the optimiser's tensors.

    Raises:
        UserError: they do not belong to trained parameters of this model.
    """
    places = _places(stored, weights, set(names.values()))
    fused = any(bool(group.get("fused")) for group in optimizer.param_groups)
    states: dict[Tensor, dict[str, Tensor]] = {}
    for piece in pieces:
        for key, place in places.get(names[piece.parameter], {}).items():
            state = states.setdefault(piece.owner, {})
            if not stored.shape(place):
                # A step counter lives where torch keeps it: on the device for fused updates only.
                device = piece.flat.device if fused else torch.device("cpu")
                state[key] = stored.read(place).reshape(()).to(device, copy=True)
            else:
                whole = state.setdefault(key, torch.zeros_like(piece.flat, memory_format=torch.contiguous_format))
                whole[piece.offset : piece.offset + piece.count].copy_(stored.read(place, piece.start, piece.count))
    optimizer.state.clear()
    for owner, state in states.items():
        state = {key: value.view(owner.shape) if value.dim() else value for key, value in state.items()}
        if hasattr(optimizer, "import_state"):
            optimizer.import_state(owner, state)
        else:
            optimizer.state[owner] = state


def _places(stored: StoredTensors, weights: WeightNames, trained: set[str]) -> dict[str, dict[str, str]]:
    """By first name of a trained parameter and kind of state: what the state is stored as."""
    places: dict[str, dict[str, str]] = {}
    problems = []
    for place in stored.names():
        key, name = place.split(".", 1)
        first = weights.first.get(name)
        if first not in trained:
            problems.append(f"{name} is not a trainable parameter of this model")
        elif stored.shape(place) not in ((), weights.shapes[first]):
            problems.append(f"{place} has the shape {[*stored.shape(place)]}, not {[*weights.shapes[first]]}")
        else:
            places.setdefault(first, {})[key] = place
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        listed = "\n  ".join(["", *problems[:_LISTED], *more])
        raise UserError(f"{stored}: this optimiser's state is not that of the configured model:{listed}")
    return places
