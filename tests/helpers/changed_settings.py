"""Settings of a run, as JSON values, with some of their keys changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def change(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set keys that are named `section__key`; the value `...` takes one out."""
    for name, value in changes.items():
        section, key = name.split("__")
        keys = settings.setdefault(section, {})
        if value is ...:
            del keys[key]
        else:
            keys[key] = value
