"""Names of the linear layers inside a block, and which of them `retention.retain_linears` means. No torch in here.

A layer's path is that within its block, such as `mlp.down_proj`; one of its names is the end of its path after any dot,
such as `down_proj`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from framework.errors import UserError

Retained = bool | tuple[str, ...]
"""All linear layers that are worth it (see `retains`) or none, or those that have one of these names."""

EVERY = "*"
"""In a list, the name of every layer."""

UP_PROJECTION = "lora_B"
"""The name of a layer of LoRA from few features to as many as the layer has that the adapter is put on."""


def retains(chosen: bool | Collection[str], path: str) -> bool:
    """Whether a layer is among the chosen ones.

    True stands for all but an adapter's `UP_PROJECTION`: what it computes is as large as the adapted layer's output,
    in the adapter's own and often wider type, and takes no longer to compute than to read.
    """
    if isinstance(chosen, bool):
        return chosen and path.rpartition(".")[2] != UP_PROJECTION
    return any(name == EVERY or path == name or path.endswith(f".{name}") for name in chosen)


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """For each path the shortest of its names that no other one has, the whole where there is none."""
    paths = dict.fromkeys(paths)
    ends: dict[str, set[str]] = {}
    for path in paths:
        for name in _names(path):
            ends.setdefault(name, set()).add(path)
    return {path: next((name for name in _names(path) if len(ends[name]) == 1), path) for path in paths}


def check_names(chosen: bool | Collection[str], paths: Collection[str]) -> None:
    """Make sure that every name is some layer's.

    Args:
        chosen: the config's `retention.retain_linears`.
        paths: of all layers.

    Raises:
        UserError: one is not.
    """
    if isinstance(chosen, bool):
        return
    for name in chosen:
        if not any(retains((name,), path) for path in paths):
            known = ", ".join(dict.fromkeys(short_names(paths).values())) or "none"
            raise UserError(
                f"retention.retain_linears: no linear layer in the model's blocks is called {name!r}; there are {known}"
            )


def _names(path: str) -> list[str]:
    """All of them, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
