"""Adapters: a PEFT config from ours, and the checks that PEFT leaves out. First of the transforms."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from framework.errors import UserError
from framework.models.head import CLASSIFICATION

if TYPE_CHECKING:
    from framework.config import AdapterConfig

# What PEFT's auto classes and its generation go by; images and masked tokens have no type of their own.
_TASK_TYPES = {"causal_lm": TaskType.CAUSAL_LM, "sequence_classification": TaskType.SEQ_CLS}
_LINEAR = (nn.Linear, Conv1D)
_LAYERS_WITH_ADAPTER = (*_LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# `peft.utils.constants.EMBEDDING_LAYER_NAMES`: PEFT keeps weights tied only for layers that it knows by these names.
_TIEABLE_NAMES = ("embed_tokens", "lm_head")


def add_adapter(model: PreTrainedModel, adapter: AdapterConfig, *, task: str) -> PeftModel:
    """Freeze `model` and put low-rank matrices beside its linear layers, in place.

    The adapter's weights are float32, except beside bfloat16 weights (precision `pure_bf16`), where they are bfloat16
    like these; copies of `modules_to_save` have the dtype of what they copy. If `modules_to_save` names one of a pair
    of tied embeddings, the pair stays tied and is trained as one. A classifier's head is always trained and saved.

    Args:
        model: The base model; works on the meta device too.
        adapter: Rank, scale, dropout and the names of modules, which match a full name or its last components.
        task: The model's head, of the config's `model.task`.

    Raises:
        UserError: A module is not found, cannot have an adapter, or is a tied embedding that PEFT cannot keep tied.
    """
    modules_to_save = list(adapter.modules_to_save)
    targets = adapter.target_modules
    problems = [*_unknown_targets(model, targets), *_unknown_modules(model, modules_to_save)]
    if problems:
        raise UserError("\n".join([*problems, f"linear modules of this model: {', '.join(_linear_names(model))}"]))
    tied = _tied_names(model)
    if hit := [name for name in tied if _is_targeted(name, targets)]:
        raise UserError(
            f"model.adapter.target_modules: {', '.join(hit)} shares its weight with another layer ({' = '.join(tied)}),"
            " beside which an adapter cannot be merged; name it in model.adapter.modules_to_save to train it in full"
        )
    keep_tied = any(_matches(name, module) for name in modules_to_save for module in tied)
    if keep_tied:
        modules_to_save = _named_for_tying(modules_to_save, tied)
    if task in CLASSIFICATION:
        modules_to_save += [name for name in _head_names(model) if name not in modules_to_save]
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=modules_to_save or None,
        task_type=_TASK_TYPES.get(task),
        ensure_weight_tying=keep_tied,
        # GPT-2's linear layers hold the transpose.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for a property by its old name:
            # https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py#L184
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # PEFT's switch: float32 for adapters beside half-precision weights.
            return get_peft_model(model, config, autocast_adapter_dtype=model.dtype != torch.bfloat16)
    except ValueError as error:
        raise UserError(f"model.adapter: {error}") from error


def _matches(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _is_targeted(module: str, targets: str | list[str]) -> bool:
    """Whether PEFT puts an adapter on `module`; "all-linear" leaves the output layer out."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, module) is not None
    return any(_matches(name, module) for name in targets)


def _unknown_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    if targets == "all-linear":
        return []
    modules = [name for name, module in model.named_modules() if isinstance(module, _LAYERS_WITH_ADAPTER)]
    wanted = [targets] if isinstance(targets, str) else targets
    missing = []
    for name in wanted:
        try:
            found = any(_is_targeted(module, targets if isinstance(targets, str) else [name]) for module in modules)
        except re.error as error:
            return [f"model.adapter.target_modules: {name!r} is not a regular expression: {error}"]
        if not found:
            missing.append(name)
    if not missing:
        return []
    kind = "matches no linear module by its full name" if isinstance(targets, str) else "not in this model"
    return [f"model.adapter.target_modules: {', '.join(missing)}: {kind}"]


def _unknown_modules(model: nn.Module, modules_to_save: list[str]) -> list[str]:
    modules = [name for name, _ in model.named_modules()]
    missing = [name for name in modules_to_save if not any(_matches(name, module) for module in modules)]
    return [f"model.adapter.modules_to_save: {', '.join(missing)}: not in this model"] if missing else []


def _linear_names(model: nn.Module) -> list[str]:
    """Last components of the names of linear modules, each once, in the model's order."""
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, _LINEAR))
    # Numbered children of a list are no name to choose by.
    return list(dict.fromkeys(name for name in names if not name.isdigit()))


def _tied_names(model: PreTrainedModel) -> list[str]:
    """Full names of the modules that share one weight as input and output embedding; empty if there are none."""
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        return []
    sharing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight is output.weight
    ]
    return sharing if len(sharing) > 1 else []


def _named_for_tying(modules_to_save: list[str], tied: list[str]) -> list[str]:
    """The names with one among them by which PEFT recognises a tied pair."""
    last = [name.rpartition(".")[2] for name in tied]
    known = [name for name in last if name in _TIEABLE_NAMES]
    if not known:
        raise UserError(
            f"model.adapter.modules_to_save: {' and '.join(tied)} share one weight, and PEFT cannot keep them tied in "
            "this family; leave them out, or set tie_word_embeddings to false in the model's config"
        )
    rest = [name for name in modules_to_save if not any(_matches(name, module) for module in tied)]
    return [*rest, known[0]]


def _head_names(model: PreTrainedModel) -> list[str]:
    """Top-level modules beside the base model that have parameters: the classification head."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
