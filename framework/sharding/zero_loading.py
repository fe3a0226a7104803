"""Stored tensors of any engine and number of ranks, for the ranges that this rank holds of what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from framework.sharding.fragments import StoredTensors
from framework.sharding.optimizer_states import OwnFormat, check_states
from framework.sharding.weight_names import WeightNames
from framework.sharding.zero_stages import Piece


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
        UserError: they are not those of the trained parameters of this model.
    """
    kinds = check_states(stored, {name: weights.shapes[name] for name in names.values()})
    fused = any(bool(group.get("fused")) for group in optimizer.param_groups)
    states: dict[Tensor, dict[str, Tensor]] = {}
    for piece in pieces:
        name = names[piece.parameter]
        for key in kinds[name]:
            place, state = f"{key}.{name}", states.setdefault(piece.owner, {})
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
        if isinstance(optimizer, OwnFormat):
            optimizer.import_state(owner, state)
        else:
            optimizer.state[owner] = state
