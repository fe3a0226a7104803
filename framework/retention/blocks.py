"""Where a Hugging Face model keeps its blocks, and what stands between them and its head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_NORM_NAMES = ("RMSNorm", "LayerNorm", "Norm1P")


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks by name, in order. What looks like a block inside of one (Zamba) is a part of that.

    Raises:
        ValueError: it has none.
    """
    blocks: dict[str, nn.Module] = {
        name: module for name, module in outside_blocks(model) if isinstance(module, GradientCheckpointingLayer)
    }
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks (GradientCheckpointingLayer): nothing to make selective"
        )
    return blocks


def outside_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules as in `named_modules`, each once, but for those inside of blocks, which are most of them."""
    seen: set[nn.Module] = set()
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        name, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if not isinstance(module, GradientCheckpointingLayer):
            children = [(f"{name}.{child}" if name else child, inner) for child, inner in module.named_children()]
            left += reversed(children)


@dataclass(frozen=True)
class Backbone:
    """What a model has below its head.

    Attributes:
        chain: the modules from the backbone down to the one that holds the blocks, each inside the one before. Heads
            call the first, or one further down (OPT calls its decoder).
        last_block: the last block.
        norms: the norms beside the blocks, of which the final norm is one.
    """

    chain: tuple[nn.Module, ...]
    last_block: nn.Module
    norms: tuple[nn.Module, ...]


def backbone_of(model: PreTrainedModel) -> Backbone:
    """The model without its head.

    Raises:
        ValueError: the model has no blocks.
    """
    top = model.base_model
    last_name, last_block = [*blocks_of(top).items()][-1]
    path = last_name.split(".")[:-2]  # without the list of blocks and the index
    chain = tuple(top.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1))
    children = (child for owner in chain for child in owner.children())
    norms = tuple(child for child in children if any(name in type(child).__name__ for name in _NORM_NAMES))
    return Backbone(chain, last_block, norms)
