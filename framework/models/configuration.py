"""From `model.path` and `model.from_config` to a Hugging Face config, and from config and task to a model class."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from framework.errors import UserError
from framework.hub import (
    PUBLIC_MAIN,
    HubOptions,
    check_source,
    how_to_get,
    local_directory,
    needs_its_own_code,
    own_code_message,
    source_name,
)
from framework.models.head import class_table

_HEADS = {
    "causal_lm": (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    "masked_lm": (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
    "sequence_classification": (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
    "image_classification": (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification),
}
# High enough that only a slip of the finger matches: families have many keys of similar names.
_MISSPELT = 0.88


def read_model_config(
    path: str | None, from_config: dict[str, Any] | None, hub: HubOptions = PUBLIC_MAIN
) -> PreTrainedConfig:
    """The Hugging Face config of a model: `from_config` if given, else the one at `path`.

    Args:
        path: A local directory with `config.json`, or a hub name.
        from_config: A Hugging Face config as JSON values, with `model_type`.
        hub: Revision, network and code.

    Raises:
        UserError: There is no readable config, its family is not known to the installed transformers, or a value or
            key is not one of that family's.
    """
    if from_config is not None:
        return _config_from_values(from_config)
    assert path is not None, "the config schema requires one of the two"
    check_source(path, hub)
    directory = local_directory(path)
    if directory is not None and not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise UserError(f"model.path: {path} holds a PEFT adapter; give the directory of its base model")
        raise UserError(f"model.path: {path} has no config.json, so it is not a Hugging Face model directory")
    try:
        with hub.access():
            return AutoConfig.from_pretrained(source_name(path), **hub.keywords())
    except (OSError, ValueError, AttributeError, StrictDataclassError) as error:
        if needs_its_own_code(error):
            raise UserError(own_code_message("model.path", path)) from error
        raise UserError(unreachable(path, error, hub)) from error


def unreachable(path: str, error: Exception, hub: HubOptions) -> str:
    """The message for a model that could not be read from `path`, with the cause and what to do."""
    if local_directory(path) is not None:
        return f"model.path: cannot read the model in {path}: {first_line(error)}"
    return (
        f"model.path: {path} is not a local directory, and could not be had from the Hugging Face hub: "
        f"{first_line(error)}\n{how_to_get(path, hub)}"
    )


def first_line(error: Exception) -> str:
    """What happened, without the paragraphs of advice that transformers adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, StrictDataclassError):
        return " ".join(lines)
    return lines[0] if lines else type(error).__name__


def build_model(
    config: PreTrainedConfig, *, task: str, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of this config with freshly initialised weights, on the current default device, in training mode.

    Args:
        config: The Hugging Face config; not changed.
        task: As in the config's `model.task`.
        dtype: Of the weights.
        attention: `sdpa` or `eager`.
        trust_remote_code: Build a model whose class comes with its config.

    Raises:
        UserError: The family has no such head or does not support this attention.
    """
    auto = auto_class(config, task)
    with attention_errors(config, attention):
        # A copy, because transformers writes the dtype and the attention implementation into the config.
        model = auto.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    check_direction(model, task)
    return model.train()


def auto_class(config: PreTrainedConfig, task: str) -> Any:
    """The transformers auto class that gives `config`'s family the head of `task`.

    Raises:
        UserError: The family has no such head; the message names those it has.
    """
    own_code = getattr(config, "auto_map", None) or {}
    mapping, auto = _HEADS[task]
    if type(config) in mapping or auto.__name__ in own_code:
        return auto
    available = [
        name
        for name, (families, its_auto) in _HEADS.items()
        if type(config) in families or its_auto.__name__ in own_code
    ]
    offer = f"set model.task to {' or '.join(available)}" if available else "it cannot be trained here"
    raise UserError(f"model.task: {config.model_type} has no head for {task}; {offer}")


def check_direction(model: PreTrainedModel, task: str) -> None:
    """Refuse an encoder as a causal language model: it would see the tokens that it is to predict.

    Raises:
        UserError: The family is an encoder and its config does not say `is_decoder`.
    """
    if task != "causal_lm" or type(model.config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return
    if not getattr(model.config, "is_decoder", True):
        raise UserError(
            f"model.task: {model.config.model_type} is an encoder, whose tokens see those after them; "
            "set model.task to masked_lm, or is_decoder to true in the model's config"
        )


@contextmanager
def attention_errors(config: PreTrainedConfig, attention: str) -> Iterator[None]:
    """Turn transformers' refusal of an attention implementation into a `UserError`."""
    try:
        yield
    except ValueError as error:
        if "attn_implementation" not in str(error):
            raise
        other = "eager" if attention == "sdpa" else "sdpa"
        raise UserError(
            f"model.attention: {config.model_type} does not support {attention} attention in this version of "
            f"transformers; set model.attention to {other}"
        ) from error


def _config_from_values(values: dict[str, Any]) -> PreTrainedConfig:
    family = values.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        known = difflib.get_close_matches(str(family), list(CONFIG_MAPPING.keys()), n=3)
        hint = f"; did you mean {', '.join(known)}?" if known else ""
        if family is None:
            raise UserError("model.from_config: model_type is missing; it names the family, such as llama")
        raise UserError(f"model.from_config: model_type {family!r} is not known to this transformers{hint}")
    config_class = CONFIG_MAPPING[family]
    known_keys = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    problems = []
    for key in values.keys() - known_keys:
        # Published configs carry keys that no class declares, so only a likely slip is refused.
        close = difflib.get_close_matches(key, known_keys - values.keys(), n=1, cutoff=_MISSPELT)
        if close:
            problems.append(f"model.from_config.{key}: not a key of {family}; did you mean {close[0]}?")
    if problems:
        raise UserError("\n".join(sorted(problems)))
    class_table(values.get("id2label"), "model.from_config.id2label")
    try:
        return config_class.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"model.from_config: {first_line(error)}") from error
