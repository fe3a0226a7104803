"""Fine-tune language models with a backward pass over selected tokens only.

The names below are imported on first use, so that a mistake in a config is reported before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.config import load_config
    from framework.token_selection import (
        TokenSelectionCallback,
        disable_token_selection,
        enable_token_selection,
        fixed_selection,
    )
    from framework.training import train

__version__ = "0.1.0"

__all__ = [
    "TokenSelectionCallback",
    "__version__",
    "disable_token_selection",
    "enable_token_selection",
    "fixed_selection",
    "load_config",
    "train",
]

_MODULES = {
    "TokenSelectionCallback": "framework.token_selection",
    "disable_token_selection": "framework.token_selection",
    "enable_token_selection": "framework.token_selection",
    "fixed_selection": "framework.token_selection",
    "load_config": "framework.config",
    "train": "framework.training",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
