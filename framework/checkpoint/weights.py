"""The weights of a checkpoint on their way into a model, tensor by tensor.

A checkpoint holds the named parameters and persistent buffers of the model as it trains (names of a PEFT-wrapped model
are those of the wrapper). With an adapter, only the trainable parameters and the buffers are stored: the frozen ones
come from the base model. A tensor that is known under several names (tied embeddings) is stored once, under the first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.checkpoint.stored import rank_file
from framework.sharding.fragments import StoredTensors
from framework.sharding.weight_names import WeightNames, tensors_by_name

WEIGHTS_FILE = rank_file("model")


def load_weights(stored: StoredTensors, model: nn.Module) -> None:
    """Copy stored weights into `model`, in place, one tensor at a time.

    A value is converted to the dtype of the tensor that receives it. Tied tensors may be stored under any of their
    names; frozen parameters of a model with an adapter may be absent.

    Args:
        stored: Weights of a checkpoint, of any number of ranks.
        model: The model, built from the same architecture and adapter, with materialised tensors on any device.

    Raises:
        UserError: Names or shapes are not those of the model. Nothing has been copied then.
    """
    WeightNames.of(model).check(stored)
    tensors = tensors_by_name(model)
    with torch.no_grad():
        for name in stored.names():
            tensors[name].copy_(_whole(stored, name))


def map_weights(stored: StoredTensors, model: nn.Module) -> None:
    """Give a model on the meta device stored weights, mapped and not read where they are whole in one file.

    Tensors that are not stored (the frozen ones beside an adapter, buffers that are not persistent) stay on the meta
    device. Tied parameters share their storage, but are separate objects afterwards.

    Args:
        stored: Weights of a checkpoint.
        model: The model, built on the meta device.

    Raises:
        UserError: As for `load_weights`.
    """
    WeightNames.of(model).check(stored)
    tensors = tensors_by_name(model)
    mapped = {id(tensors[name]): _whole(stored, name) for name in stored.names()}
    every_name = {name: mapped[id(tensor)] for name, tensor in tensors.items() if id(tensor) in mapped}
    model.load_state_dict(every_name, strict=False, assign=True)


def _whole(stored: StoredTensors, name: str) -> Tensor:
    return stored.read(name).view(stored.shape(name))
