"""Loading a model with its weights, or initialising it at random, with or without an adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from framework.errors import UserError
from framework.hub import PUBLIC_MAIN, HubOptions, source_name
from framework.models.adapters import add_adapter
from framework.models.architecture import Architecture, describe, read_architecture
from framework.models.configuration import (
    attention_errors,
    auto_class,
    build_model,
    check_direction,
    read_model_config,
    unreachable,
)
from framework.models.head import CLASSIFICATION, describe_classes, set_padding
from framework.models.quantization import quantize
from framework.models.tokens import AddedTokens, add_tokens

if TYPE_CHECKING:
    from framework.config import AdapterConfig

logger = logging.getLogger(__name__)

_LISTED_NAMES = 5
_SEED_LIMIT = 2**63


def load_model(
    *,
    path: str | None,
    from_config: dict[str, Any] | None,
    task: str,
    dtype: torch.dtype,
    attention: str,
    seed: int,
    adapter: AdapterConfig | None = None,
    label_names: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    hub: HubOptions = PUBLIC_MAIN,
    added_tokens: AddedTokens | None = None,
    quantization: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a model from `path`, or initialise one at random if there is only `from_config`.

    What is drawn at random (all weights, a new classification head, an adapter) depends on `seed` alone, and the
    process's random state is left as it was. An adapter's draw does not depend on how the base was made.

    Args:
        path: A local directory or a hub name with weights; None for random weights.
        from_config: A Hugging Face config as JSON values, with `model_type`. With `path` it only describes the
            architecture for planning: the model is built from the config at `path`, which must agree with it.
        task: As in the config's `model.task`.
        dtype: Of the weights. Adapters: see `add_adapter`.
        attention: `sdpa` or `eager`.
        seed: Not negative.
        adapter: Freeze the model and add an adapter, or None.
        label_names: A classifier's classes, written into its config; None leaves those of the config.
        pad_token_id: The tokenizer's, which a text classifier is told; see `set_padding`.
        hub: Revision, network and code, for `path`.
        added_tokens: Rows to add to the embedding, or None.
        quantization: `nf4` for the linear layers of the blocks in 4 bits, beside an adapter; None for none.

    Returns:
        The model on the CPU in training mode, wrapped by PEFT if there is an adapter.

    Raises:
        UserError: The model or its weights are missing or do not fit, or the family does not support an option.
    """
    with _seeded(seed):
        if path is None:
            config = describe_classes(read_model_config(None, from_config), task=task, label_names=label_names)
            model = build_model(config, task=task, dtype=dtype, attention=attention)
        else:
            config = describe_classes(read_model_config(path, None, hub), task=task, label_names=label_names)
            model = _load_pretrained(path, config, task=task, dtype=dtype, attention=attention, hub=hub)
    if path is not None and from_config is not None:
        described = read_architecture(
            path=None, from_config=from_config, task=task, attention=attention, label_names=label_names
        )
        _check_description(describe(model, task=task), described, path)
    with _seeded(seed):
        token_ids = None if added_tokens is None else add_tokens(model, added_tokens)
    if task == "sequence_classification":
        set_padding(model, pad_token_id)
    if quantization is not None:
        quantize(model)
    if adapter is None:
        return model
    # Another stream than the weights', so that the adapter is not made of the same draws.
    with _seeded((seed + 1) % _SEED_LIMIT):
        return add_adapter(model, adapter, task=task, added_tokens=token_ids)


def _load_pretrained(
    path: str, config: PreTrainedConfig, *, task: str, dtype: torch.dtype, attention: str, hub: HubOptions
) -> PreTrainedModel:
    auto = auto_class(config, task)
    with attention_errors(config, attention), hub.access():
        try:
            model, report = auto.from_pretrained(
                source_name(path),
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                **hub.keywords(),
            )
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{unreachable(path, error, hub)}\n"
                "(For random weights, leave out model.path and give model.from_config.)"
            ) from error
        except RuntimeError as error:
            raise UserError(f"model.path: the weights in {path} do not fit its config.json: {error}") from error
    check_direction(model, task)
    _check_missing(model, set(report["missing_keys"]), task=task, path=path)
    return model.train()


def _check_missing(model: PreTrainedModel, missing: set[str], *, task: str, path: str) -> None:
    """A new head is what classification starts from; any other weight that is not in the files is a mistake."""
    if task in CLASSIFICATION:
        body = f"{model.base_model_prefix}."
        heads = sorted(name for name in missing if not name.startswith(body) or ".pooler." in name)
        if heads:
            logger.warning("not in %s, so initialised at random: %s", path, _listed(heads))
        missing -= set(heads)
    if missing:
        raise UserError(
            f"model.path: {path} lacks {len(missing)} weights of a {model.config.model_type} model for {task}: "
            f"{_listed(sorted(missing))}\nThe files are incomplete, or of a model with another head (model.task)."
        )


def _check_description(loaded: Architecture, described: Architecture, path: str) -> None:
    if loaded != described:
        differing = [
            f"{name} {theirs} instead of {ours}"
            for name, ours in vars(loaded).items()
            if (theirs := getattr(described, name)) != ours
        ]
        raise UserError(
            f"model.from_config: describes another model than the one in {path}: {', '.join(differing)}; "
            "leave it out, or copy the model's config.json"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` on the CPU, where models are built, and restore the generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more
