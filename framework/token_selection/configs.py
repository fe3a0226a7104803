"""The config objects of a model, which say what attention it runs, and which several models may share."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def give_own_configs(model: nn.Module) -> None:
    """Replace the configs that a model and its parts hold by copies, shared among them as before.

    A model switches its attention in its config object, which other models may have been built over.

    Args:
        model: the model, with its wrappers; changed in place.
    """
    copies: dict[int, Any] = {}  # one for all, so that what was one object stays one
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, copies))
