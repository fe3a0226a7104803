"""Sizes of a decoder that closed forms are written in."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from framework.errors import UserError
from framework.models.architecture import build_empty
from framework.retention import blocks_of

_GATED = {"q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Shapes:
    """A decoder with blocks of attention and a gated MLP, as Llama's and those that are built like it.

    Attributes:
        family: Hugging Face's `model_type`.
        hidden: width of rows between blocks.
        mlp: width of the MLP.
        blocks: their number.
        heads: of the queries.
        queries: width of all heads together.
        keys: width of all heads of the keys, and of those of the values.
        vocabulary: rows of the head.
        matrices: `(in, out)` of a block's linear layers by name.
        norms: elements of a block's norms.
        rest: other elements of a block: biases.
        outside: elements of embedding, final norm and head; a tied head is no other than the embedding.
    """

    family: str
    hidden: int
    mlp: int
    blocks: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    matrices: dict[str, tuple[int, int]]
    norms: int
    rest: int
    outside: int

    @property
    def matrix_elements(self) -> int:
        """Of a block's linear layers."""
        return sum(rows * columns for rows, columns in self.matrices.values())

    @property
    def block(self) -> int:
        """Elements of a block."""
        return self.matrix_elements + self.norms + self.rest

    @property
    def parameters(self) -> int:
        """Elements of the model."""
        return self.blocks * self.block + self.outside

    @property
    def head(self) -> int:
        """Elements of the head's matrix."""
        return self.vocabulary * self.hidden

    def adapter(self, rank: int, targets: tuple[str, ...]) -> int:
        """Elements of a block's LoRA matrices."""
        return sum(rank * sum(self.matrices[target]) for target in targets)


def shapes_of(config: PreTrainedConfig) -> Shapes:
    """The sizes of the model that a config describes; no weights are allocated.

    Args:
        config: of a causal language model whose blocks are alike.

    Raises:
        UserError: its blocks are not of attention and a gated MLP.
    """
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    if getattr(one, "layer_types", None) is not None:
        one.layer_types = one.layer_types[:1]
    options = {"task": "causal_lm", "dtype": torch.bfloat16, "attention": "eager"}
    model, _ = build_empty(one, added_tokens=None, **options)
    (block,) = blocks_of(model).values()
    linears = {name.rpartition(".")[2]: each for name, each in block.named_modules() if isinstance(each, nn.Linear)}
    if not linears.keys() >= _GATED:
        raise UserError(f"model_type: there is no closed form for the blocks of {config.model_type}")
    matrices = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    elements = sum(parameter.numel() for parameter in block.parameters())
    norms = sum(parameter.numel() for name, parameter in block.named_parameters() if "norm" in name)
    weights = sum(rows * columns for rows, columns in matrices.values())
    return Shapes(
        family=config.model_type,
        hidden=config.hidden_size,
        mlp=matrices["down_proj"][0],
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        queries=matrices["q_proj"][1],
        keys=matrices["k_proj"][1],
        vocabulary=config.vocab_size,
        matrices=matrices,
        norms=norms,
        rest=elements - norms - weights,
        outside=sum(parameter.numel() for parameter in model.parameters()) - elements,
    )
