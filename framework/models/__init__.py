"""Models: loading, random initialisation, adapters, and what is known about an architecture without its weights."""

from framework.models.architecture import Architecture, check_compatibility, count_parameters, read_architecture
from framework.models.loading import load_model

__all__ = ["Architecture", "check_compatibility", "count_parameters", "load_model", "read_architecture"]
