"""Models: loading, random initialisation, adapters, and what is known about an architecture without its weights."""

from framework.models.architecture import Architecture, check_compatibility, count_parameters, read_architecture
from framework.models.configured import (
    configured_architecture,
    configured_classes,
    configured_empty_model,
    configured_image_processor,
    configured_model,
    configured_tokenizer,
    tokenizer_source,
)
from framework.models.initial import sharded_model
from framework.models.loading import load_model
from framework.models.tokens import AddedTokens

__all__ = [
    "AddedTokens",
    "Architecture",
    "check_compatibility",
    "configured_architecture",
    "configured_classes",
    "configured_empty_model",
    "configured_image_processor",
    "configured_model",
    "configured_tokenizer",
    "count_parameters",
    "load_model",
    "read_architecture",
    "sharded_model",
    "tokenizer_source",
]
