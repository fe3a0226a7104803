"""The Hugging Face model inside of what wraps it."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper, or the model itself.

    Raises:
        ValueError: there is no Hugging Face model inside.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a Hugging Face model (PreTrainedModel) nor a PEFT wrapper of one"
        )
    return inner
