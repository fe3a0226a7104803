"""Adapters: a PEFT config from ours, and the checks that PEFT leaves out. First of the transforms."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from framework.config.adapters import ADAPTER_METHODS, TRAINS_TOKEN_ROWS, AdapterMethod
from framework.errors import UserError
from framework.models.head import CLASSIFICATION
from framework.models.targets import (
    ALL_LINEAR,
    head_names,
    ia3_modules,
    is_targeted,
    linear_names,
    matches,
    named_for_tying,
    norm_names,
    packed_modules,
    tied_names,
    unknown_modules,
    unknown_targets,
)
from framework.models.tokens import token_rows
from framework.retention.linears import PackedLinear

if TYPE_CHECKING:
    from framework.config import AdapterConfig

# What PEFT's auto classes and its generation go by; images and masked tokens have no type of their own.
_TASK_TYPES = {"causal_lm": TaskType.CAUSAL_LM, "sequence_classification": TaskType.SEQ_CLS}
# What PEFT raises for options of a wrong type or size, or for layers that a method does not know or implement.
_PEFT_ERRORS = (ValueError, TypeError, AttributeError, ImportError, RuntimeError, IndexError)
# Methods that compute indices, which the meta device cannot.
_COMPUTED_SHAPES = ("boft", "unilora")


def add_adapter(
    model: PreTrainedModel, adapter: AdapterConfig, *, task: str, added_tokens: list[int] | None = None
) -> PeftModel:
    """Freeze `model` and add what an adapter method trains, in place.

    The adapter's weights are float32, except beside bfloat16 weights (precision `pure_bf16`), where they are bfloat16
    like these; copies of `modules_to_save` have the dtype of what they copy. If `modules_to_save` names one of a pair
    of tied embeddings, the pair stays tied and is trained as one. A classifier's head is always trained and saved.

    Args:
        model: The base model; on the meta device the adapter is there too, for counting.
        adapter: The method, its numbers, the names of modules, which match a full name or its last components, and
            further options of the method's PEFT config.
        task: The model's head, of the config's `model.task`.
        added_tokens: Ids of tokens that the model has got for this run: their rows of the embedding (and of an untied
            head) are trained, unless `modules_to_save` names the embedding.

    Raises:
        UserError: An option is unknown; a module is not found, cannot have an adapter, or is a tied embedding that
            PEFT cannot keep tied; or PEFT refuses the values.
    """
    method = ADAPTER_METHODS[adapter.kind]
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type]
    targets = _targets(model, adapter, method, added_tokens)
    problems = [
        *_unknown_options(adapter, kind),
        *([] if targets is None else unknown_targets(model, targets, norms=method.targets == "norms")),
        *unknown_modules(model, adapter.modules_to_save),
        *packed_modules(model, adapter.modules_to_save),
    ]
    if problems:
        raise UserError("\n".join([*problems, f"linear modules of this model: {', '.join(linear_names(model))}"]))
    settings: dict[str, Any] = {
        **_method_settings(model, adapter, method, added_tokens),
        **_saved_modules(model, adapter, kind, targets, task=task),
        "target_modules": targets,
        "task_type": _TASK_TYPES.get(task),
    }
    if "fan_in_fan_out" in _names(kind):
        # GPT-2's linear layers hold the transpose.
        settings["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    on_meta = model.device.type == "meta"
    if on_meta and adapter.kind == "shira":
        # Its mask is drawn from the weights; it has as many values as a LoRA of its rank has.
        kind = LoraConfig
        settings = {name: value for name, value in settings.items() if name not in adapter.options}
    empty = on_meta and adapter.kind in _COMPUTED_SHAPES
    try:
        with warnings.catch_warnings(), torch.device("cpu" if empty else model.device):
            # PEFT asks transformers for a property by its old name:
            # https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py#L184
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted = get_peft_model(
                model,
                kind(**settings),
                # PEFT's switch: float32 for adapters beside half-precision weights.
                autocast_adapter_dtype=model.dtype != torch.bfloat16,
                # PEFT's switch: parameters on the meta device, whatever the default one is.
                low_cpu_mem_usage=empty,
            )
            _match_dtype(adapted, model.dtype)
            return adapted
    except _PEFT_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"model.adapter: PEFT cannot add {adapter.kind} to this model: {error}\n"
            "Change model.adapter.target_modules or the method's numbers and options."
        ) from error


def _match_dtype(model: PeftModel, dtype: torch.dtype) -> None:
    """Give what is trained beside quantised layers the dtype that PEFT finds at the weights of others.

    On the meta device PEFT looks at no weights.
    """
    on_meta = model.device.type == "meta"
    if dtype != torch.bfloat16:
        return
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and (on_meta or isinstance(layer.get_base_layer(), PackedLinear)):
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def starts_from_base_weights(adapter: AdapterConfig) -> bool:
    """Whether an adapter can be built beside real weights only: PiSSA and OLoRA start from these, SHiRA from a mask."""
    return adapter.kind == "shira" or changes_base_weights(adapter)


def changes_base_weights(adapter: AdapterConfig) -> bool:
    """Whether the method's start is taken out of the base model's weights (PiSSA, OLoRA)."""
    return str(adapter.options.get("init_lora_weights")).lower().startswith(("pissa", "olora"))


def _targets(
    model: PreTrainedModel, adapter: AdapterConfig, method: AdapterMethod, added_tokens: list[int] | None
) -> str | list[str] | None:
    """The modules to adapt; None leaves the choice to PEFT."""
    targets = adapter.target_modules
    if targets is not None:
        return targets if isinstance(targets, str) else list(targets)
    if method.targets == "norms":
        return norm_names(model)
    if method.targets == "family":
        return ia3_modules(model.config.model_type)[0]
    if method.targets == "embedding":
        # None: PEFT's choice is the input embedding, and what is tied to it.
        return [*token_rows(model, [], added_tokens)] if added_tokens else None
    return ALL_LINEAR


def _method_settings(
    model: PreTrainedModel, adapter: AdapterConfig, method: AdapterMethod, added_tokens: list[int] | None
) -> dict[str, Any]:
    """What the method's PEFT config is given beside names of modules."""
    settings: dict[str, Any] = {**adapter.options, **method.fixed}
    for name, value in ((method.rank, adapter.rank), (method.alpha, adapter.alpha), (method.dropout, adapter.dropout)):
        if name is not None and value is not None:
            settings[name] = value
    if method.instead_of_rank is not None and adapter.rank is not None:
        settings[method.instead_of_rank] = 0
    if method.targets == "family" and adapter.target_modules is None:
        settings.setdefault("feedforward_modules", ia3_modules(model.config.model_type)[1])
    if not added_tokens:
        return settings
    embeddings = token_rows(model, adapter.modules_to_save, added_tokens)
    if embeddings and adapter.kind not in TRAINS_TOKEN_ROWS:
        raise UserError(
            f'model.added_tokens: kind "{adapter.kind}" cannot train single rows; name {" and ".join(embeddings)} in '
            f"model.adapter.modules_to_save, or use {' or '.join(TRAINS_TOKEN_ROWS)}"
        )
    if adapter.kind == "trainable_tokens":
        settings["token_indices"] = sorted({*settings.get("token_indices", []), *added_tokens})
    elif embeddings:
        if "trainable_token_indices" in settings:
            raise UserError(
                "model.adapter.options.trainable_token_indices: the rows of model.added_tokens are trained anyway; "
                "name the embedding in model.adapter.modules_to_save to train further rows"
            )
        settings["trainable_token_indices"] = embeddings
    return settings


def _saved_modules(
    model: PreTrainedModel, adapter: AdapterConfig, kind: type[PeftConfig], targets: Any, *, task: str
) -> dict[str, Any]:
    """The modules that are trained in full, with tied embeddings kept tied."""
    modules_to_save = list(adapter.modules_to_save)
    tied = tied_names(model)
    if targets is not None and (hit := [name for name in tied if is_targeted(name, targets)]):
        raise UserError(
            f"model.adapter.target_modules: {', '.join(hit)} shares its weight with another layer ({' = '.join(tied)}),"
            " beside which an adapter cannot be merged; name it in model.adapter.modules_to_save to train it in full"
        )
    settings: dict[str, Any] = {}
    if any(matches(name, module) for name in modules_to_save for module in tied):
        if "ensure_weight_tying" not in _names(kind):
            raise UserError(
                f"model.adapter.modules_to_save: {' and '.join(tied)} share one weight, which PEFT keeps tied beside "
                'kind "lora" or "dora" only; use one of these, or leave the embedding out'
            )
        modules_to_save = named_for_tying(modules_to_save, tied)
        settings["ensure_weight_tying"] = True
    if task in CLASSIFICATION:
        modules_to_save += [name for name in head_names(model) if name not in modules_to_save]
    if modules_to_save:
        if "modules_to_save" not in _names(kind):
            raise UserError(f'model.adapter.modules_to_save: kind "{adapter.kind}" saves no further modules')
        settings["modules_to_save"] = modules_to_save
    return settings


def _unknown_options(adapter: AdapterConfig, kind: type[PeftConfig]) -> list[str]:
    """A line for each option that the method's PEFT config does not have, with the nearest that it has."""
    lines = []
    for name in sorted(adapter.options.keys() - _names(kind)):
        close = difflib.get_close_matches(name, _names(kind), n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(_names(kind)))}"
        lines.append(f"model.adapter.options.{name}: not an option of {kind.__name__}; {hint}")
    return lines


def _names(kind: type[PeftConfig]) -> set[str]:
    return {field.name for field in fields(kind) if field.init}
