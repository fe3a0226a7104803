"""What a classifier's config says about its classes, and how it finds its pooled token."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from framework.errors import UserError
from framework.hub import PUBLIC_MAIN, HubOptions, source_name

CLASSIFICATION = ("sequence_classification", "image_classification")
"""Tasks whose model has a classifier on a pooled token."""

_SINGLE_LABEL = "single_label_classification"

_READ_ALL = ("clip", "dinov2", "dinov2_with_registers", "ijepa", "metaclip_2", "siglip", "siglip2")
"""Families whose classifier averages tokens without a key of their config that says so."""


def named_classes(
    path: str | None, from_config: dict[str, Any] | None, hub: HubOptions = PUBLIC_MAIN
) -> list[str] | int | None:
    """The classes that a model's config names: their names, only their number, or None if it says nothing of them.

    transformers fills in two classes without a name where a config says nothing, so this reads the values as written.

    Args:
        path: A local directory or a hub name; counts where it is given, as in training.
        from_config: A Hugging Face config as JSON values.
        hub: Revision and network, for `path`.

    Raises:
        UserError: The names are no object from numbers to names, the numbers have gaps, or classes share a name.
    """
    if path is not None:
        with hub.access():
            values, _ = PreTrainedConfig.get_config_dict(
                source_name(path), revision=hub.revision or "main", local_files_only=hub.offline
            )
    else:
        values = from_config or {}
    option = "model.from_config.id2label" if path is None else "model.path: config.json: id2label"
    classes = class_table(values.get("id2label"), option)
    names = [classes[number] for number in sorted(classes)]
    if sorted(classes) != list(range(len(names))):
        numbers = ", ".join(map(str, sorted(classes)))
        raise UserError(f"{option}: the numbers are {numbers}; classes are numbered from 0 without gaps")
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(f"{option}: several classes have the names {', '.join(repeated)}; give each its own")
    if names:
        generic = all(name == f"LABEL_{number}" for number, name in enumerate(names))
        return len(names) if generic else names
    number: int | None = values.get("num_labels")
    return number


def class_table(id2label: Any, option: str) -> dict[int, str]:
    """Number and name of each class, from the `id2label` of a config as it is written; none if it is null.

    Args:
        id2label: A JSON value.
        option: What messages call it.

    Raises:
        UserError: It is no object from numbers to names.
    """
    if id2label is None:
        return {}
    if not isinstance(id2label, dict):
        raise UserError(f'{option}: must be an object from class numbers to names, such as {{"0": "no", "1": "yes"}}')
    for number, name in id2label.items():
        if not re.fullmatch("0|[1-9][0-9]{0,8}", str(number)):
            raise UserError(f"{option}: {number!r} is no class number")
        if not isinstance(name, str | int | float):
            raise UserError(f"{option}: the name of class {number} is {json.dumps(name)}")
    return {int(number): str(name) for number, name in id2label.items()}


def known_classes(given: Sequence[str] | None, named: list[str] | int | None) -> tuple[list[str] | None, int | None]:
    """What is known about the classes before the data is read: their names, or only their number.

    Args:
        given: `data.label_names`.
        named: From `named_classes`.

    Raises:
        UserError: The two contradict each other.
    """
    if given is None:
        return (named, None) if isinstance(named, list) else (None, named)
    count = len(named) if isinstance(named, list) else named
    if count is not None and count != len(given):
        raise UserError(
            f"data.label_names: {len(given)} names, but the model's config has {count} classes; the two must agree"
        )
    if isinstance(named, list) and list(given) != named:
        differing = next(number for number, name in enumerate(given) if name != named[number])
        raise UserError(
            f"data.label_names: class {differing} is {given[differing]!r}, but {named[differing]!r} in the model's "
            "config; the two must agree"
        )
    return list(given), None


def describe_classes(config: PreTrainedConfig, *, task: str, label_names: Sequence[str] | None) -> PreTrainedConfig:
    """Write the classes into a model's config, in place, if the task has any.

    Args:
        config: The Hugging Face config.
        task: As in the config's `model.task`.
        label_names: In the order of their numbers; None leaves what the config has.

    Raises:
        UserError: The config is of a regression or of several labels a sample.
    """
    if task not in CLASSIFICATION:
        return config
    if config.problem_type not in (None, _SINGLE_LABEL):
        raise UserError(
            f"model.from_config: problem_type {config.problem_type!r} is not supported: data has one class a sample, "
            f"which is {_SINGLE_LABEL!r}"
        )
    config.problem_type = _SINGLE_LABEL
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: number for number, name in enumerate(label_names)}
    return config


def set_padding(model: PreTrainedModel, pad_token_id: int | None) -> None:
    """Tell a text classifier the padding token, without which transformers' decoders pool the wrong one.

    It is set on the built model, because an embedding that is built with it would not train the token's own row, which
    is the end of sequence's for many tokenizers.

    Args:
        model: The classifier.
        pad_token_id: The tokenizer's; None if it is not known.

    Raises:
        UserError: The model's config names another one.
    """
    config = model.config.get_text_config()
    if pad_token_id is None or config.pad_token_id == pad_token_id:
        return
    if config.pad_token_id is not None:
        raise UserError(
            f"model.tokenizer: pads with token {pad_token_id}, but the model's config says pad_token_id "
            f"{config.pad_token_id}, by which a classifier finds the end of a text; make them agree"
        )
    config.pad_token_id = pad_token_id


def pooling_of(model: PreTrainedModel) -> Literal["first", "last", "mean"]:
    """Which tokens a classifier's head reads: the first, the last that is not padding, or all of them.

    Decoders' heads are called `score` and read the last token (transformers' `GenericForSequenceClassification`).
    Encoders read the first, unless their config or their family takes a mean. `framework.training` compares this with
    what a model's head does read before it trains on selected tokens.
    """
    if hasattr(model, "score"):
        return "last"
    config = model.config
    averages = getattr(config, "classifier_pooling", None) == "mean" or getattr(config, "use_mean_pooling", False)
    return "mean" if averages or config.model_type in _READ_ALL else "first"


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(type(model).forward).parameters
