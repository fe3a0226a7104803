"""Symbols for what a choice keeps: with them one law holds for choices that differ in that. Must not import torch.

A recorded step retains all linear outputs, and keys and values in 8 bits. What depends on that is marked in the
recording: the output of a layer that is not retained takes nothing until the replay computes it.
"""

from __future__ import annotations

from collections.abc import Iterable

from framework.linear_names import retains
from framework.planner.choice import Choice

RETAINED = "retained:"
"""Before the path of a linear layer: 1 if its output is retained, else 0."""

COMPUTED = "computed:"
"""Before the path of a linear layer: 1 if the replay computes its output, else 0."""

LEVELS = "levels"
"""Bytes of a quantised key's or value's levels / those of levels of 8 bits."""

SCALES = "scales"
"""Bytes of the scales of 16-bit keys and values / those of scales in float32."""


def option_sizes(choice: Choice, symbols: Iterable[str]) -> dict[str, float]:
    """The values of those symbols that a choice decides about."""
    half = 0.5 if choice.kv_format == "int4" else 1.0
    sizes = {LEVELS: half, SCALES: half}
    for symbol in symbols:
        for prefix, value in ((RETAINED, True), (COMPUTED, False)):
            if symbol.startswith(prefix):
                sizes[symbol] = float(retains(choice.retain_linears, symbol.removeprefix(prefix)) is value)
    return sizes
