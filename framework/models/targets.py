"""Which modules of a model an adapter's settings name: targets, modules that are saved in full, tied embeddings."""

from __future__ import annotations

import re

from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from framework.errors import UserError
from framework.retention.linears import PackedLinear

ALL_LINEAR = "all-linear"
_LINEAR = (nn.Linear, Conv1D)
_LAYERS_WITH_ADAPTER = (*_LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# `peft.utils.constants.EMBEDDING_LAYER_NAMES`: PEFT keeps weights tied only for layers that it knows by these names.
_TIEABLE_NAMES = ("embed_tokens", "lm_head")


def matches(name: str, module: str) -> bool:
    """Whether `name` is a module's full name or its last components."""
    return module == name or module.endswith(f".{name}")


def is_targeted(module: str, targets: str | list[str]) -> bool:
    """Whether PEFT puts an adapter on `module`; "all-linear" leaves the output layer out."""
    if isinstance(targets, str):
        return targets != ALL_LINEAR and re.fullmatch(targets, module) is not None
    return any(matches(name, module) for name in targets)


def unknown_targets(model: nn.Module, targets: str | list[str], *, norms: bool) -> list[str]:
    """A line about targets that the model lacks, or an empty list.

    Args:
        model: The base model.
        targets: As in the config.
        norms: Whether the method's targets are norms, and not layers with a matrix.
    """
    if targets == ALL_LINEAR:
        return ["model.adapter.target_modules: the method adapts norms, name these"] if norms else []
    suits = is_norm if norms else _has_matrix
    modules = [name for name, module in model.named_modules() if suits(module)]
    wanted = [targets] if isinstance(targets, str) else targets
    missing = []
    for name in wanted:
        try:
            found = any(is_targeted(module, targets if isinstance(targets, str) else [name]) for module in modules)
        except re.error as error:
            return [f"model.adapter.target_modules: {name!r} is not a regular expression: {error}"]
        if not found:
            missing.append(name)
    if not missing:
        return []
    kind = "matches no linear module by its full name" if isinstance(targets, str) else "not in this model"
    return [f"model.adapter.target_modules: {', '.join(missing)}: {kind}"]


def unknown_modules(model: nn.Module, modules_to_save: list[str]) -> list[str]:
    """A line about modules to save that the model lacks, or an empty list."""
    modules = [name for name, _ in model.named_modules()]
    missing = [name for name in modules_to_save if not any(matches(name, module) for module in modules)]
    return [f"model.adapter.modules_to_save: {', '.join(missing)}: not in this model"] if missing else []


def packed_modules(model: nn.Module, modules_to_save: list[str]) -> list[str]:
    """A line about modules to save that cannot be trained because they are quantised, or an empty list."""
    quantised = (name.split(".") for name, module in model.named_modules() if isinstance(module, PackedLinear))
    # The layers and everything that holds one.
    within = {".".join(parts[:end]) for parts in quantised for end in range(1, len(parts) + 1)}
    hit = [name for name in modules_to_save if any(matches(name, module) for module in within)]
    if not hit:
        return []
    return [f"model.adapter.modules_to_save: {', '.join(hit)}: quantised (model.quantization), so it cannot be trained"]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with weights, told by its class name as transformers' families have it."""
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def _has_matrix(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS_WITH_ADAPTER)


def norm_names(model: nn.Module) -> list[str]:
    """Full names of the norms."""
    return [name for name, module in model.named_modules() if is_norm(module)]


def linear_names(model: nn.Module) -> list[str]:
    """Last components of the names of linear modules, each once, in the model's order."""
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, _LINEAR))
    # Numbered children of a list are no name to choose by.
    return list(dict.fromkeys(name for name in names if not name.isdigit()))


def ia3_modules(family: str) -> tuple[list[str], list[str]]:
    """The modules that IA³ scales in a family, and those of them whose input it scales, as PEFT has them.

    Raises:
        UserError: PEFT does not know the family.
    """
    if family not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise UserError(
            f"model.adapter.target_modules: missing: PEFT has no IA³ modules for {family}; name the projections of "
            "keys and values and the last of the feed-forward part, and the latter in options.feedforward_modules too"
        )
    targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[family]
    return list(targets), list(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family])


def tied_names(model: PreTrainedModel) -> list[str]:
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


def can_stay_tied(tied: list[str]) -> bool:
    """Whether PEFT keeps these modules tied when they are trained in full; true if there are none."""
    return not tied or any(name.rpartition(".")[2] in _TIEABLE_NAMES for name in tied)


def named_for_tying(modules_to_save: list[str], tied: list[str]) -> list[str]:
    """The names with one among them by which PEFT recognises a tied pair.

    Raises:
        UserError: PEFT knows none of the pair's names.
    """
    if not can_stay_tied(tied):
        raise UserError(
            f"model.adapter.modules_to_save: {' and '.join(tied)} share one weight, and PEFT cannot keep them tied in "
            "this family; leave them out, or set tie_word_embeddings to false in the model's config"
        )
    rest = [name for name in modules_to_save if not any(matches(name, module) for module in tied)]
    return [*rest, next(name for module in tied if (name := module.rpartition(".")[2]) in _TIEABLE_NAMES)]


def head_names(model: PreTrainedModel) -> list[str]:
    """Top-level modules beside the base model that have parameters: the classification head."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
