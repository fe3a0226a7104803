"""Tokenizer or image processor, classes, architecture and model that a run's config describes: one way to each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from framework.config import Config
from framework.data import load_tokenizer
from framework.data.images import load_image_processor
from framework.errors import UserError
from framework.hub import HubOptions
from framework.models.adapters import add_adapter
from framework.models.architecture import Architecture, build_empty, read_architecture
from framework.models.configuration import read_model_config
from framework.models.head import describe_classes, named_classes, set_padding
from framework.models.loading import load_model
from framework.models.quantization import quantize
from framework.models.tokens import AddedTokens

if TYPE_CHECKING:
    from framework.config import ModelConfig


def tokenizer_source(config: Config) -> str:
    """Directory or hub name of the tokenizer.

    Raises:
        UserError: the config names none.
    """
    source = config.model.tokenizer or config.model.path
    if source is None:
        raise UserError("model.tokenizer: missing, and there is no model.path to take it from")
    return source


def configured_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, with its added tokens. Raises as `framework.data.load_tokenizer` does."""
    settings = config.model
    hub = hub_options(settings)
    if settings.tokenizer is not None:
        # The revision is the model's.
        hub = HubOptions(offline=settings.offline, trust_remote_code=settings.trust_remote_code)
    return load_tokenizer(tokenizer_source(config), hub=hub, added_tokens=settings.added_tokens)


def configured_image_processor(config: Config) -> BaseImageProcessor:
    """The image processor of a run on images. Raises as `framework.data.images.load_image_processor` does."""
    settings = config.model
    return load_image_processor(settings.path, base_config(config), hub=hub_options(settings))


def configured_classes(config: Config) -> list[str] | int | None:
    """What the model's config says of the classes, `data.label_names` aside; see `named_classes`."""
    settings = config.model
    return named_classes(settings.path, settings.from_config, hub_options(settings))


def configured_architecture(
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    with_adapter: bool = True,
    pixels: tuple[int, ...] | None = None,
    examine: Callable[[nn.Module], None] | None = None,
) -> Architecture:
    """What a run's config says of its model, without weights. Raises as `read_architecture` does.

    Args:
        config: of the run.
        tokenizer: with the added tokens; None for images, and where it is not at hand.
        with_adapter: count and check the adapter too.
        pixels: `(channels, height, width)` of the images that it will get, to count their tokens.
        examine: called with the model on the meta device, before it is forgotten.
    """
    settings = config.model
    return read_architecture(
        path=settings.path,
        from_config=settings.from_config,
        task=settings.task,
        attention=settings.attention,
        adapter=settings.adapter if with_adapter else None,
        quantization=settings.quantization,
        label_names=config.data.label_names,
        pixels=pixels,
        examine=examine,
        hub=hub_options(settings),
        added_tokens=added_tokens_of(settings, tokenizer),
    )


def configured_model(
    config: Config, tokenizer: PreTrainedTokenizerBase | None = None, *, quantized: bool = True
) -> PreTrainedModel | PeftModel:
    """The model of a run, with its added tokens and its adapter, on the CPU. Raises as `load_model` does.

    Args:
        config: of the run, a classifier's with `data.label_names`.
        tokenizer: with the added tokens; None loads it if there is something that the model takes from it, which are
            the ids of added tokens and a text classifier's padding.
        quantized: quantise as the run does; otherwise the weights are as in the files.
    """
    settings = config.model
    if tokenizer is None and (settings.added_tokens or settings.task == "sequence_classification"):
        tokenizer = configured_tokenizer(config)
    return load_model(
        path=settings.path,
        from_config=settings.from_config,
        task=settings.task,
        dtype=weights_dtype(config),
        attention=settings.attention,
        seed=config.run.seed,
        adapter=settings.adapter,
        label_names=config.data.label_names,
        pad_token_id=None if tokenizer is None else tokenizer.pad_token_id,
        hub=hub_options(settings),
        added_tokens=added_tokens_of(settings, tokenizer),
        quantization=settings.quantization if quantized else None,
    )


def configured_empty_model(
    config: Config, tokenizer: PreTrainedTokenizerBase | None, *, quantized: bool = True
) -> PreTrainedModel | PeftModel:
    """Like `configured_model`, on the meta device.

    Args:
        config: of the run, a classifier's with `data.label_names`.
        tokenizer: with the added tokens; None for images.
        quantized: with the parameters that quantised layers have.
    """
    settings = config.model
    model, token_ids = build_empty(
        base_config(config),
        task=settings.task,
        dtype=weights_dtype(config),
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        added_tokens=added_tokens_of(settings, tokenizer),
    )
    if settings.task == "sequence_classification":
        set_padding(model, None if tokenizer is None else tokenizer.pad_token_id)
    if quantized and settings.quantization is not None:
        quantize(model)
    if settings.adapter is None:
        return model
    return add_adapter(model, settings.adapter, task=settings.task, added_tokens=token_ids)


def base_config(config: Config) -> PreTrainedConfig:
    """The Hugging Face config of a run's model, classes included, before tokens are added.

    As in training, the config at `model.path` counts where there is one.
    """
    settings = config.model
    read = read_model_config(settings.path, None if settings.path else settings.from_config, hub_options(settings))
    return describe_classes(read, task=settings.task, label_names=config.data.label_names)


def hub_options(settings: ModelConfig) -> HubOptions:
    """How the model of a run is fetched."""
    return HubOptions(settings.revision, settings.offline, settings.trust_remote_code)


def added_tokens_of(settings: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> AddedTokens | None:
    """The rows that a run adds, or None if it adds no tokens."""
    tokens = settings.added_tokens
    if not tokens:
        return None
    ids: Any = None if tokenizer is None else tuple(sorted(tokenizer.convert_tokens_to_ids(tokens)))
    return AddedTokens(len(tokens), ids, settings.pad_vocabulary_to)


def weights_dtype(config: Config) -> torch.dtype:
    """The torch dtype of a run's weights."""
    dtype: torch.dtype = getattr(torch, config.weights_dtype)
    return dtype
