"""What is enabled on a model, and the forward pass that it makes of the model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from framework.models.head import pooling_of
from framework.retention import SelectiveRetention, head_rows, output_layer_of
from framework.selection import (
    IGNORED,
    Selection,
    documents_of,
    pooled_positions,
    select,
    supervised_positions,
)
from framework.token_selection.trainers import FUSED_HEAD, refuse_foreign_arguments
from framework.training.fused_loss import fused_loss
from framework.training.loss import LossKind, loss_kind, rows_loss, selected_supervised_rows


class TokenSelection:
    """What is enabled on a model: which tokens, and what is retained of them. See `enable_token_selection`.

    Attributes:
        retention: the blocks' side; `retention.fallbacks` names blocks that fall back, with the reason, and
            `retention.in_runs` those that are replayed from their recurrent state.
        drawn: number of documents drawn for so far; with `seed` it determines the next draw, so save and restore it
            (`state_dict`, `load_state_dict`) to resume a loop that draws through the model's forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        retention: SelectiveRetention,
        *,
        strategy: str,
        ratio: float | str,
        seed: int,
        tokentune: bool,
        normalization: str,
        fused_loss: bool,
    ) -> None:
        self.retention = retention
        self.kind = loss_kind(model)
        self.strategy, self.ratio, self.seed, self.tokentune = strategy, ratio, seed, tokentune
        self.normalization, self.fused_loss = normalization, fused_loss
        self.fixed: Selection | None = None
        self.mean_over_fixed = False
        self.drawn = 0
        # Bound to the model: the class's own, or what a trainer has put in its place.
        self.plain_forward = model.forward
        self.own_forward: Callable[..., Any] | None = None
        self.signature = inspect.signature(type(model).forward)

    def start_step(self, step: int) -> None:
        """Number the documents of an optimiser step from its own number, so that its draws depend on that alone.

        For loops that know their step and want the draws after a resume to be those of an uninterrupted run.
        """
        self.drawn = step << 32

    def state_dict(self) -> dict[str, int]:
        """The draw counter."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the draw counter."""
        self.drawn = state["drawn"]

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward: token-selective with labels in train mode, plain in eval mode and under `no_grad`."""
        if not model.training or not torch.is_grad_enabled():
            with self.retention.seam.paused():
                return self.plain_forward(*args, **kwargs)
        inputs = self._named_arguments(model, args, kwargs)
        refuse_foreign_arguments(model, inputs)
        if getattr(model.config, "output_router_logits", False) or inputs.get("output_router_logits"):
            raise ValueError(
                "the auxiliary loss of the router needs gradients of every token: "
                "set output_router_logits=False in the model's config to train with token selection"
            )
        if self.kind is LossKind.POOLED:
            return self._pooled(model, inputs)
        if inputs.get(FUSED_HEAD):
            return self._fused_head(inputs)
        return self._token_level(model, inputs)

    def _named_arguments(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, without a key/value cache, which a replay would fill twice."""
        head = {FUSED_HEAD: kwargs.pop(FUSED_HEAD)} if FUSED_HEAD in kwargs else {}
        (_, *bound) = self.signature.bind_partial(model, *args, **kwargs).arguments.items()
        inputs: dict[str, Any] = head
        for name, value in bound:
            collected = self.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            inputs.update(value if collected else {name: value})
        if "use_cache" in self.signature.parameters or "use_cache" in inputs:
            inputs["use_cache"] = False
        return inputs

    def _token_level(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
        """Σ loss · weight over selected supervised rows / count; logits of these rows only, or none."""
        labels, count = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        supervised = supervised_positions(labels, causal=self.kind is LossKind.CAUSAL)
        selection = self._selection(supervised, inputs)
        index, targets, probability = selected_supervised_rows(labels, self.kind, selection.to(labels.device))
        weights = 1 / probability if self.normalization == "supervised" and probability is not None else None
        if count is None:
            count = len(index) if weights is None or self.mean_over_fixed else supervised.sum()
        count = count.clamp(min=1) if torch.is_tensor(count) else max(1, count)
        layer = output_layer_of(model) if self.fused_loss else None
        if layer is not None:
            with self.retention.selecting(selection), fused_loss(model, layer, index, targets, weights, count) as fused:
                output = self.plain_forward(**inputs)
            return fused.put_into(output)
        with self.retention.selecting(selection), head_rows(model, index):
            output = self.plain_forward(**inputs)
        is_tuple = isinstance(output, tuple)
        logits = output[0] if is_tuple else output.logits
        loss = rows_loss(logits[0], targets, weights) / count
        return (loss, *output) if is_tuple else type(output)(**{"loss": loss, **output})

    def _pooled(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
        """The model's own loss of its pooled token, which is always selected.

        With one class a sample, in float32 or better and divided by `num_items_in_batch` if that is given.
        """
        labels, count = inputs["labels"], inputs.pop("num_items_in_batch", None)

        def draw(hidden: Tensor) -> Selection:
            shape = (hidden.shape[0], hidden.shape[1])
            pooling, padding = pooling_of(model), getattr(model.config.get_text_config(), "pad_token_id", None)
            pooled = pooled_positions(pooling, shape, inputs.get("input_ids"), padding).to(hidden.device)
            read = torch.ones_like(pooled) if pooling == "mean" else pooled
            return self._selection(read, inputs, hidden).to(hidden.device).including(pooled)

        one_class = labels.dim() == 1 and not labels.is_floating_point() and model.config.num_labels > 1
        if one_class:
            del inputs["labels"]
        elif count is not None:
            raise ValueError("num_items_in_batch: a mean over several micro-batches needs one class a sample as labels")
        with self.retention.selecting(draw):
            output = self.plain_forward(**inputs)
        if not one_class:
            return output
        is_tuple = isinstance(output, tuple)
        loss = rows_loss(output[0] if is_tuple else output.logits, labels)
        loss = loss / ((labels != IGNORED).sum().clamp(min=1) if count is None else count)
        return (loss, *output) if is_tuple else type(output)(**{"loss": loss, **output})

    def _fused_head(self, inputs: dict[str, Any]) -> Any:
        """A head that forms no logits and gives losses per token (TRL's): it sees the selected labels only."""
        if self.strategy != "supervised" and self.ratio != 1 and self.normalization == "supervised":
            raise ValueError(
                f"selection.strategy: {self.strategy!r} weighs the loss of each token by the inverse of its "
                "probability, which TRL's fused head cannot: use strategy='supervised', or normalization='selected'"
            )
        labels = inputs["labels"]
        supervised = supervised_positions(labels, causal=True)
        selection = self._selection(supervised, inputs).to(labels.device)
        unselected = supervised & ~selection.mask(labels.shape[1])
        inputs["labels"] = labels.masked_fill(functional.pad(unselected[:, :-1], (1, 0), value=False), IGNORED)
        with self.retention.selecting(selection):
            return self.plain_forward(**inputs)

    def _selection(self, supervised: Tensor, inputs: dict[str, Any], hidden: Tensor | None = None) -> Selection:
        """The fixed selection, or a new draw over the batch's documents."""
        if self.fixed is not None:
            self.fixed.check_fits(*supervised.shape)
            return self.fixed
        mask = inputs.get("attention_mask")
        mask = mask if mask is not None and mask.dim() == 2 else None
        like = supervised if hidden is None else hidden
        documents = documents_of(like, mask, inputs.get("position_ids"), self.drawn)
        self.drawn = max(self.drawn, int(documents.max()) + 1)
        if dist.is_available() and dist.is_initialized():
            # Each rank counts its own samples; numbered apart, different samples are drawn for independently.
            ranked = documents * dist.get_world_size() + dist.get_rank()
            documents = ranked.where(documents >= 0, documents)
        return select(
            strategy=self.strategy,
            ratio=self.ratio,
            supervised=supervised,
            documents=documents,
            seed=self.seed,
            tokentune=self.tokentune,
        )
