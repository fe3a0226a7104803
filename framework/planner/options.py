"""Symbols for what a choice keeps: with them one law holds for choices that differ in that. Must not import torch.

A recorded step retains all linear outputs. What depends on that is marked in the recording: the output of a layer
that is not retained takes nothing until the replay computes it.
"""

from __future__ import annotations

from collections.abc import Iterable

from framework.linear_names import retains
from framework.planner.choice import Choice

RETAINED = "retained:"
"""Before the path of a linear layer: 1 if its output is retained, else 0."""

COMPUTED = "computed:"
"""Before the path of a linear layer: 1 if the replay computes its output, else 0."""


def option_sizes(choice: Choice, symbols: Iterable[str]) -> dict[str, float]:
    """The values of those symbols that a choice decides about."""
    sizes: dict[str, float] = {}
    for symbol in symbols:
        for prefix, value in ((RETAINED, True), (COMPUTED, False)):
            if symbol.startswith(prefix):
                sizes[symbol] = float(retains(choice.retain_linears, symbol.removeprefix(prefix)) is value)
    return sizes
