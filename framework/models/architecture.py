"""What is known about a model without its weights, and whether it fits the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from framework.errors import UserError
from framework.hub import PUBLIC_MAIN, HubOptions
from framework.models.adapters import add_adapter
from framework.models.configuration import build_model, read_model_config
from framework.models.head import CLASSIFICATION, describe_classes, pooling_of, takes
from framework.models.quantization import quantize, quantized_elements
from framework.models.tokens import AddedTokens, add_tokens

if TYPE_CHECKING:
    from framework.config import AdapterConfig


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model.

    Attributes:
        family: Hugging Face's `model_type`.
        parameters: Elements of all parameters, tied ones counted once, adapter included.
        trainable_parameters: Those that are trained: all, or with an adapter the adapter's.
        blocks: Number of transformer layers.
        hidden_size: Width of the rows between blocks.
        vocab_size: Rows of the token embedding; None for a model without tokens.
        max_positions: Longest sequence in tokens; None if the family has no limit.
        attention_heads: Query heads; None if the family does not say.
        key_value_heads: Key and value heads; None if the family does not say.
        pooling: Which tokens a classifier's head reads, see `pooling_of`; None for language models.
        token_types: Whether the model takes `token_type_ids`.
        image_tokens: Tokens that the blocks see of an image; None for other inputs, or where it was not asked for.
        quantized_parameters: Those of `parameters` that are quantised.
        quantized_bytes: What holds these.
    """

    family: str
    parameters: int
    trainable_parameters: int
    blocks: int
    hidden_size: int
    vocab_size: int | None
    max_positions: int | None
    attention_heads: int | None
    key_value_heads: int | None
    pooling: Literal["first", "last", "mean"] | None = None
    token_types: bool = False
    image_tokens: int | None = None
    quantized_parameters: int = 0
    quantized_bytes: int = 0


def read_architecture(
    *,
    path: str | None,
    from_config: dict[str, Any] | None,
    task: str = "causal_lm",
    attention: str = "eager",
    adapter: AdapterConfig | None = None,
    label_names: Sequence[str] | None = None,
    pixels: tuple[int, ...] | None = None,
    examine: Callable[[nn.Module], None] | None = None,
    hub: HubOptions = PUBLIC_MAIN,
    added_tokens: AddedTokens | None = None,
    quantization: str | None = None,
) -> Architecture:
    """Describe a model from its config alone: it is built on the meta device, so no weights are read or allocated.

    Args:
        path: A local directory with `config.json`, or a hub name; unused if `from_config` is given.
        from_config: A Hugging Face config as JSON values, with `model_type`.
        task: The head, as in the config's `model.task`.
        attention: `sdpa` or `eager`; without influence on the sizes, but refused where the family lacks it, which no
            family does for `eager`.
        adapter: Counted and checked like in a run.
        label_names: A classifier's classes; None takes what the config says of them.
        pixels: `(channels, height, width)` of the images that it will get, to count their tokens.
        examine: Called with the model, adapter included, before it is forgotten.
        hub: Revision, network and code, for `path`.
        added_tokens: Rows that a run adds to the embedding, or None.
        quantization: As in the config's `model.quantization`.

    Raises:
        UserError: What `load_model` would refuse, weights apart.
    """
    config = describe_classes(read_model_config(path, from_config, hub), task=task, label_names=label_names)
    model, token_ids = build_empty(
        config,
        task=task,
        dtype=torch.bfloat16,
        attention=attention,
        trust_remote_code=hub.trust_remote_code,
        added_tokens=added_tokens,
    )
    described = describe(model, task=task)
    if pixels is not None:
        described = replace(described, image_tokens=_image_tokens(model, pixels))
    if quantization is not None:
        quantize(model)
        elements, size = quantized_elements(model)
        described = replace(described, quantized_parameters=elements, quantized_bytes=size)
    whole = model if adapter is None else add_adapter(model, adapter, task=task, added_tokens=token_ids)
    if examine is not None:
        examine(whole)
    parameters, trainable = count_parameters(whole)
    return replace(described, parameters=parameters, trainable_parameters=trainable)


def build_empty(
    config: PreTrainedConfig, *, added_tokens: AddedTokens | None, **options: Any
) -> tuple[PreTrainedModel, list[int] | None]:
    """A model on the meta device, without an adapter, and the ids of its added tokens, if there are any.

    Args:
        config: The Hugging Face config.
        added_tokens: Rows to add to the embedding, or None.
        options: See `build_model`.

    Raises:
        UserError: As for `build_model` and `add_tokens`.
    """
    with torch.device("meta"):
        model = build_model(config, **options)
        return model, None if added_tokens is None else add_tokens(model, added_tokens)


def describe(model: PreTrainedModel, *, task: str) -> Architecture:
    """The sizes of a built model with the head of `task` and without an adapter; it may be on the meta device."""
    text = model.config.get_text_config()
    parameters, trainable = count_parameters(model)
    embedding = _token_embedding(model)
    heads = getattr(text, "num_attention_heads", None)
    return Architecture(
        family=model.config.model_type,
        parameters=parameters,
        trainable_parameters=trainable,
        blocks=_count_blocks(model),
        hidden_size=text.hidden_size,
        vocab_size=None if embedding is None else embedding.num_embeddings,
        max_positions=_max_positions(model),
        attention_heads=heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        pooling=pooling_of(model) if task in CLASSIFICATION else None,
        token_types=takes(model, "token_type_ids"),
    )


class _FirstBlockReachedError(Exception):
    """Ends a forward pass; holds the shape of what the first block got."""


def _image_tokens(model: PreTrainedModel, pixels: tuple[int, ...]) -> int:
    """Tokens that a model on the meta device makes of an image; 1 if it has no blocks.

    Raises:
        UserError: The model takes images of another size.
    """

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstBlockReachedError((args[0] if args else kwargs["hidden_states"]).shape)

    first = next((module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)), None)
    if first is None:
        return 1
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(torch.zeros(1, *pixels, dtype=model.dtype, device=model.device))
    except _FirstBlockReachedError as reached:
        (shape,) = reached.args
        return math.prod(shape[1:-1])
    except ValueError as error:
        raise UserError(
            f"model.path: the image processor makes images of {pixels[2]} x {pixels[1]} pixels and {pixels[0]} "
            f"channels, which the model does not take: {error}"
        ) from error
    finally:
        handle.remove()
    raise AssertionError("the model's forward did not reach its first block")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Elements of all parameters and of those that require gradient, tied ones counted once.

    A quantised matrix counts as many as it stands for.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    quantized, held = quantized_elements(model)
    return sum(size for size, _ in sizes) - held + quantized, sum(size for size, trainable in sizes if trainable)


def check_compatibility(
    architecture: Architecture, tokenizer: PreTrainedTokenizerBase | None, sequence_length: int
) -> None:
    """Check that the data fits the model: positions and token ids.

    Args:
        architecture: Of the model.
        tokenizer: What makes the token ids; None for a model without tokens.
        sequence_length: Longest sequence in tokens.

    Raises:
        UserError: The sequence is longer than the model has positions, or the tokenizer has ids beyond the model's
            embedding; both problems are reported together.
    """
    problems = []
    if architecture.max_positions is not None and sequence_length > architecture.max_positions:
        problems.append(
            f"data.sequence_length: {sequence_length} is more than the {architecture.max_positions} positions of this "
            f"{architecture.family} model; set it to at most {architecture.max_positions}"
        )
    if tokenizer is not None and architecture.vocab_size is not None:
        token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if largest >= architecture.vocab_size:
            problems.append(
                f"model.tokenizer: {tokenizer.name_or_path} gives ids up to {largest} ({token!r}), but the model "
                f"embeds {architecture.vocab_size} tokens, ids 0 to {architecture.vocab_size - 1}; use the model's "
                f"own tokenizer, or with model.from_config set vocab_size to at least {largest + 1}"
            )
    if problems:
        raise UserError("\n".join(problems))


def _count_blocks(model: nn.Module) -> int:
    """Transformer layers that are not part of another one."""
    count = 0
    pending: list[nn.Module] = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, GradientCheckpointingLayer):
            count += 1
        else:
            pending.extend(module.children())
    return count


def _token_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    if model.main_input_name != "input_ids":
        return None
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, nn.Embedding) else None


def _max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence: what the config says, less the rows that RoBERTa's position table reserves.

    RoBERTa numbers positions from `padding_idx + 1` (`create_position_ids_from_input_ids` of transformers), so a table
    of 514 rows with padding index 1 has 512 positions.
    """
    if model.main_input_name != "input_ids":
        return None
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit
