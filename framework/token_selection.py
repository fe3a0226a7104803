"""Token-selective training of a Hugging Face model in place: the Python interface.

framework.enable_token_selection(model)
model(**batch).loss.backward()          # train mode, labels given
framework.disable_token_selection(model)
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from framework.foreign_trainers import FUSED_HEAD, refuse_foreign_arguments, refuse_foreign_forward
from framework.models.head import pooling_of
from framework.retention import SelectiveRetention, head_rows
from framework.selection import (
    IGNORED,
    Selection,
    check_options,
    documents_of,
    pooled_positions,
    select,
    supervised_positions,
)
from framework.training.loss import LossKind, loss_kind, rows_loss, selected_supervised_rows, unwrapped

_ATTRIBUTE = "_token_selection"


class TokenSelection:
    """What is enabled on a model: which tokens, and what is retained of them. See `enable_token_selection`.

    Attributes:
        retention: the blocks' side; `retention.fallbacks` names blocks that fall back, with the reason.
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
    ) -> None:
        self.retention = retention
        self.kind = loss_kind(model)
        self.strategy, self.ratio, self.seed, self.tokentune = strategy, ratio, seed, tokentune
        self.normalization = normalization
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
        """Σ loss · weight over selected supervised rows / count; logits of these rows only."""
        labels, count = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        supervised = supervised_positions(labels, causal=self.kind is LossKind.CAUSAL)
        selection = self._selection(supervised, inputs).to(labels.device)
        index, targets, probability = selected_supervised_rows(labels, self.kind, selection)
        weights = 1 / probability if self.normalization == "supervised" and probability is not None else None
        with self._running(selection), head_rows(model, index):
            output = self.plain_forward(**inputs)
        is_tuple = isinstance(output, tuple)
        logits = output[0] if is_tuple else output.logits
        loss = rows_loss(logits[0], targets, weights)
        if count is None:
            count = len(index) if weights is None or self.mean_over_fixed else supervised.sum()
        loss = loss / (count.clamp(min=1) if torch.is_tensor(count) else max(1, count))
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
        with self._running(draw):
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
        with self._running(selection):
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

    @contextlib.contextmanager
    def _running(self, selection: Any) -> Iterator[None]:
        self.retention.begin(selection)
        try:
            yield
            self.retention.check_used()
        finally:
            self.retention.end()


def enable_token_selection(
    model: nn.Module,
    strategy: str = "supervised",
    ratio: float | str = "labelled",
    retain_linears: bool = True,
    kv_format: str = "model",
    seed: int = 0,
    tokentune: bool = False,
    normalization: str = "supervised",
) -> TokenSelection:
    """Make a model's training token-selective, in place.

    In train mode with labels, the forward value is the ordinary one, `loss` is Σ loss · weight over the selected
    supervised tokens divided by the batch's supervised tokens (or by `num_items_in_batch`), `logits` are those of the
    selected supervised tokens, `[1, rows, vocabulary]`, and `loss.backward()` sends gradient through selected tokens
    only. In eval mode and under `no_grad` the model behaves as before. Classifiers with one label a sequence keep
    their own loss, and the token that they pool is always selected; where they pool by a mean, `supervised` selects
    all that enter it, which is all. Position in the order of transforms: after adapters,
    before sharding.

    Args:
        model: a Hugging Face causal LM, masked LM or classifier with blocks, or a PEFT model around one.
        strategy: `supervised` (all labelled tokens, and context up to `ratio`), `uniform` or `bernoulli`.
        ratio: selected tokens over non-padding tokens, or `"labelled"`: labelled tokens only.
        retain_linears: keep linear outputs at selected rows, so that the backward pass recomputes no matrix product.
        kv_format: how keys and values of all tokens are kept, `model` or `int8`.
        seed: seed of the draws.
        tokentune: with `uniform`, force the first and the last token, as TokenTune does.
        normalization: `supervised`: unbiased, each loss weighted by the inverse of its probability; `selected`: mean
            over the selected supervised tokens, as TokenTune does.

    Returns:
        The state that is now on the model.

    Raises:
        ValueError: an option has no meaning, the model is of another kind, has no blocks, or is enabled already.
    """
    check_options(strategy, ratio, tokentune)
    if normalization not in ("supervised", "selected"):
        raise ValueError(f"selection.normalization: {normalization!r} is neither 'supervised' nor 'selected'")
    inner = unwrapped(model)
    if _ATTRIBUTE in vars(inner):
        raise ValueError(
            "token selection is enabled on this model already: call framework.disable_token_selection first"
        )
    refuse_foreign_forward(inner.forward)
    retention = SelectiveRetention(inner, retain_linears=retain_linears, kv_format=kv_format)
    state = TokenSelection(
        inner, retention, strategy=strategy, ratio=ratio, seed=seed, tokentune=tokentune, normalization=normalization
    )
    retention.install()
    state.own_forward = _forward_in_place_of(inner)
    setattr(inner, _ATTRIBUTE, state)
    inner.forward = types.MethodType(state.own_forward, inner)
    return state


def _forward_in_place_of(model: PreTrainedModel) -> Any:
    """A forward for a model, with the signature of its class's, which trainers inspect.

    It stays correct as the inner part of a wrapper that outlives `disable_token_selection`.
    """
    before = model.forward

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        state = vars(self).get(_ATTRIBUTE)
        return before(*args, **kwargs) if state is None else state.forward(self, args, kwargs)

    forward.__doc__ = before.__doc__
    # Not `__wrapped__`: Accelerate unwraps a model's forward down to the innermost.
    forward.__signature__ = inspect.signature(type(model).forward)
    return forward


def _state_of(model: nn.Module) -> TokenSelection:
    state = vars(unwrapped(model)).get(_ATTRIBUTE)
    if state is None:
        raise ValueError("token selection is not enabled on this model: call framework.enable_token_selection first")
    return state


def disable_token_selection(model: nn.Module) -> None:
    """Give the model back as it was before `enable_token_selection`.

    Raises:
        ValueError: it is not enabled.
    """
    inner, state = unwrapped(model), _state_of(model)
    state.retention.remove()
    delattr(inner, _ATTRIBUTE)
    if inner.forward.__func__ is state.own_forward:
        del inner.forward
        if state.plain_forward.__func__ is not type(inner).forward:
            inner.forward = state.plain_forward


@contextlib.contextmanager
def fixed_selection(model: nn.Module, selection: Selection | Tensor) -> Iterator[None]:
    """Within this context forward uses these positions instead of a draw.

    The loss is the mean over the labelled tokens at these positions, or their sum over `num_items_in_batch` if that is
    given. A `Selection` brings its inclusion probabilities, which weigh the loss as in a draw.

    Args:
        model: a model with token selection enabled.
        selection: int64 `[batch, selected]`, sorted and distinct in every row, or a `Selection`.

    Raises:
        ValueError: not enabled; positions unsorted or repeated.
    """
    state = _state_of(model)
    previous = state.fixed, state.mean_over_fixed
    state.mean_over_fixed = not isinstance(selection, Selection)
    state.fixed = Selection.of_positions(selection) if state.mean_over_fixed else selection
    try:
        yield
    finally:
        state.fixed, state.mean_over_fixed = previous
