"""A model's parameters and buffers, their names and their places."""

from __future__ import annotations

from torch import Tensor, nn


def places(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """Where each parameter and buffer of a model is registered: module and attribute."""
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(tensor, []).append((module, attribute))
    return places


def every_name(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model under every name it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved, by their first name."""
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                buffers[f"{prefix}.{name}" if prefix else name] = buffer
    return buffers
