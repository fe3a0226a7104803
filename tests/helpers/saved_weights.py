"""Weights of a model as a run of one process saves them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from framework.checkpoint.tensor_files import write_tensors
from framework.sharding.weight_names import saved_tensors


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the weights of `model` to one file."""
    write_tensors(path, saved_tensors(model))
