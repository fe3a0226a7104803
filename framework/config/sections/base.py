"""What all sections of a config are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NonEmpty = Annotated[str, Field(min_length=1)]

Paths = NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]

Count = Annotated[int, Field(ge=1)]

CountOrZero = Annotated[int, Field(ge=0)]


Auto = Literal["auto"]
"""Stands for a value that the planner chooses."""


class Section(BaseModel):
    """What all sections share: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
