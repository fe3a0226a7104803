"""Tokens that a run adds to a model: rows of its embedding and head, how they start, and which of them are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from framework.errors import UserError
from framework.models.targets import can_stay_tied, matches, tied_names


@dataclass(frozen=True)
class AddedTokens:
    """What a run adds to the vocabulary.

    Attributes:
        count: number of tokens.
        ids: their ids, ascending; None where there is no tokenizer to tell, as in planning: the rows are counted as if
            they followed the embedding's.
        multiple: the embedding's rows are rounded up to a multiple of it.
    """

    count: int
    ids: tuple[int, ...] | None = None
    multiple: int | None = None


def add_tokens(model: PreTrainedModel, added: AddedTokens) -> list[int]:
    """Give a model rows for added tokens, in place, and return their ids.

    The embedding grows only as far as it has to: many models have more rows than their tokenizer has tokens. Rows of
    added tokens, and further new ones, start as the mean of the rows before the first of them, in the embedding and in
    an untied head, as transformers' `resize_token_embeddings(mean_resizing=True)` does up to a noise of 1e-9 of the
    covariance (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

    Args:
        model: The base model, before adapters; its tensors may be on the meta device.
        added: The tokens.

    Raises:
        UserError: The model has no embedding of tokens that can grow.
    """
    embedding = model.get_input_embeddings() if model.main_input_name == "input_ids" else None
    if not isinstance(embedding, nn.Embedding):
        raise UserError(f"model.added_tokens: {model.config.model_type} has no embedding of tokens that could grow")
    rows = embedding.num_embeddings
    ids = [*range(rows, rows + added.count)] if added.ids is None else [*added.ids]
    wanted = max(rows, ids[-1] + 1)
    if added.multiple is not None:
        wanted = math.ceil(wanted / added.multiple) * added.multiple
    if wanted > rows:
        try:
            model.resize_token_embeddings(wanted, mean_resizing=False)
        # What families without a resizable embedding or head raise; transformers has no type of its own for it.
        except (NotImplementedError, ValueError, TypeError) as error:
            raise UserError(f"model.added_tokens: {model.config.model_type} cannot be resized: {error}") from error
    fresh = sorted({*ids, *range(rows, wanted)})
    with torch.no_grad():
        for matrix in _row_tensors(model):
            if matrix.device.type != "meta":
                matrix[fresh] = matrix[: fresh[0]].mean(0, dtype=torch.float32).to(matrix.dtype)
    return ids


def token_rows(model: PreTrainedModel, modules_to_save: list[str], ids: list[int]) -> dict[str, list[int]]:
    """Rows to train beside a frozen model: full name of the embedding, and of an untied head, to `ids`.

    What `modules_to_save` names is trained whole and left out.

    Raises:
        UserError: The head has a bias, which PEFT's trained rows would drop.
    """
    named = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {named[embedding]: [named[embedding]]}
    layer_of_head = None
    if head is not None:
        layer_of_head = named[embedding if head.weight is embedding.weight else head]
        names.setdefault(layer_of_head, []).append(named[head])
    rows = {
        layer: ids
        for layer, own in names.items()
        if not any(matches(saved, name) for saved in modules_to_save for name in own)
    }
    if layer_of_head in rows and getattr(head, "bias", None) is not None:
        tied = tied_names(model)
        advice = (
            f"name {' and '.join(rows)} in model.adapter.modules_to_save"
            if can_stay_tied(tied)
            else "leave out model.adapter or the tokens: nor can it train this family's embedding tied to the head"
        )
        raise UserError(
            f"model.added_tokens: the head {named[head]} has a bias, beside which PEFT cannot train single rows; "
            f"{advice}"
        )
    return rows


def _row_tensors(model: PreTrainedModel) -> list[Tensor]:
    """The weights and biases with a row for each token: of the embedding, and of a head that is not tied to it."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tensors = [embedding.weight]
    if head is not None:
        tensors += [
            t for t in (head.weight, getattr(head, "bias", None)) if t is not None and t is not embedding.weight
        ]
    return tensors
