"""The loss per label: summed over supervised rows, or over samples with a class, divided by a count of the caller's.

Logits are formed for supervised rows only, in training and in evaluation.
"""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from framework.models.wrapping import unwrapped
from framework.retention import forward_in_place, head_in_chunks, head_rows, output_layer_of
from framework.selection import Selection, supervised_positions
from framework.training.fused_loss import fused_loss


class LossKind(Enum):
    """What a label belongs to."""

    CAUSAL = "causal"  # position i predicts label i + 1
    OWN = "own"  # position i predicts its own label
    POOLED = "pooled"  # one label a sequence, predicted from a pooled token


_KINDS = {
    LossKind.CAUSAL: (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,),
    LossKind.OWN: (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    LossKind.POOLED: (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
}

# Classes that come with a model's own code are in no table; transformers notes the auto class that loaded them.
_KINDS_OF_AUTO_CLASSES = {
    "AutoModelForCausalLM": LossKind.CAUSAL,
    "AutoModelForMaskedLM": LossKind.OWN,
    "AutoModelForTokenClassification": LossKind.OWN,
    "AutoModelForSequenceClassification": LossKind.POOLED,
    "AutoModelForImageClassification": LossKind.POOLED,
}


def loss_kind(model: PreTrainedModel) -> LossKind:
    """What the model's labels belong to, by transformers' own tables of model classes, or by its auto class.

    Raises:
        ValueError: the model is no causal LM, masked LM, token, sequence or image classifier.
    """
    name = type(model).__name__
    for base in type(model).__mro__:
        for kind, tables in _KINDS.items():
            if any(base.__name__ in table.values() for table in tables):
                return kind
    if model._auto_class in _KINDS_OF_AUTO_CLASSES:
        return _KINDS_OF_AUTO_CLASSES[model._auto_class]
    raise ValueError(f"{name} is no supported kind of model: causal LM, masked LM, token, sequence or image classifier")


def token_targets(labels: Tensor, kind: LossKind) -> Tensor:
    """The label that each position predicts, int64 `[batch, sequence]`; meaningless where nothing is supervised."""
    return functional.pad(labels[:, 1:], (0, 1), value=-100) if kind is LossKind.CAUSAL else labels


def rows_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ weight · cross-entropy, in float32 or better; a zero with a graph if there are no rows.

    Args:
        logits: `[rows, classes]`.
        targets: int64 `[rows]`.
        weights: `[rows]`, or None for ones.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    if weights is None:
        return functional.cross_entropy(precise, targets, reduction="sum")
    return (functional.cross_entropy(precise, targets, reduction="none") * weights).sum()


def selected_supervised_rows(
    labels: Tensor, kind: LossKind, selection: Selection | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows that enter the loss.

    Args:
        labels: int64 `[batch, sequence]`.
        kind: `CAUSAL` or `OWN`.
        selection: on the labels' device; None for all supervised rows.

    Returns:
        Rows of the flattened tokens int64 `[rows]`, their targets int64 `[rows]`, their inclusion probabilities
        float32 `[rows]` (None without a selection).
    """
    supervised = supervised_positions(labels, causal=kind is LossKind.CAUSAL)
    targets = token_targets(labels, kind).flatten()
    if selection is None:
        index = supervised.flatten().nonzero()[:, 0]
        return index, targets[index], None
    chosen = supervised.gather(1, selection.positions) & selection.valid
    first = torch.arange(labels.shape[0], device=labels.device)[:, None] * labels.shape[1]
    index = (selection.positions + first)[chosen]
    return index, targets[index], selection.probability[chosen]


def exact_loss(model: nn.Module, inputs: dict[str, Any], count: Tensor | float) -> Tensor:
    """Σ cross-entropy over the labels of a batch / `count`, with a graph, by ordinary training.

    Args:
        model: a causal or masked LM or classifier, possibly wrapped by PEFT, in train mode.
        inputs: what the model takes, `labels` included: `[batch, sequence]`, or a classifier's class numbers `[batch]`.
        count: supervised tokens, or samples, of the whole accumulation window.
    """
    inner = unwrapped(model)
    arguments = {name: value for name, value in inputs.items() if name != "labels"}
    kind = loss_kind(inner)
    if kind is LossKind.POOLED:
        return rows_loss(_class_logits(model, arguments), inputs["labels"]) / count
    index, targets, _ = selected_supervised_rows(inputs["labels"], kind, None)
    layer = output_layer_of(inner)
    if layer is None:
        with head_rows(inner, index):
            logits = model(**arguments, use_cache=False).logits[0]
        return rows_loss(logits, targets) / count
    plain = inner.forward

    # The model returns the loss, so that engines see it leave.
    def forward(*args: Any, **kwargs: Any) -> Any:
        with fused_loss(inner, layer, index, targets, None, count) as fused:
            output = plain(*args, **kwargs)
        return fused.put_into(output)

    with forward_in_place(inner, forward):
        loss: Tensor = model(**arguments, use_cache=False).loss
    return loss


def _class_logits(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Logits `[batch, classes]`; decoders are kept from filling a cache of keys and values."""
    accepted = inspect.signature(type(unwrapped(model)).forward).parameters
    cache = {"use_cache": False} if "use_cache" in accepted else {}
    logits: Tensor = model(**arguments, **cache).logits
    return logits


class Evaluated(NamedTuple):
    """Sums over the labels of a batch."""

    loss: Tensor
    """Cross-entropy, float32 `[]` on the device."""
    labels: int
    """Supervised tokens, or samples with a class."""
    correct: Tensor | None = None
    """Samples whose class has the largest logit, int64 `[]` on the device; None for language models."""


CHUNK_ROWS = 1024
"""Rows whose logits exist at one time in an evaluation."""


def chunks_for(rows: int) -> int:
    """The number of parts in which the head sees so many rows."""
    return max(1, -(-rows // CHUNK_ROWS))


@torch.no_grad()
def evaluation_loss(model: nn.Module, inputs: dict[str, Any], chunks: int | None = None) -> Evaluated:
    """Σ cross-entropy over the labels of a batch, by the plain model; tokens' head and loss in chunks.

    Args:
        model: a causal or masked LM or classifier, possibly wrapped by PEFT, in eval mode.
        inputs: what the model takes, `labels` included: `[batch, sequence]`, or a classifier's class numbers `[batch]`.
        chunks: calls of a language model's head; None for `chunks_for` its rows. Ranks need to agree on it.
    """
    inner = unwrapped(model)
    arguments = {name: value for name, value in inputs.items() if name != "labels"}
    kind, labels = loss_kind(inner), inputs["labels"]
    if kind is LossKind.POOLED:
        logits = _class_logits(model, arguments)
        return Evaluated(rows_loss(logits, labels), len(labels), (logits.argmax(-1) == labels).sum())
    index, targets, _ = selected_supervised_rows(labels, kind, None)
    total = torch.zeros((), device=labels.device)

    def add(logits: Tensor, part: Tensor) -> None:
        total.add_(rows_loss(logits, targets[part]))

    with head_in_chunks(inner, index, chunks or chunks_for(len(index)), add):
        model(**arguments, use_cache=False)
    return Evaluated(total, len(index))
