"""Switching token selection on and off on a model, and fixing its positions."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Collection, Iterator
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from framework.models.wrapping import unwrapped
from framework.retention import SelectiveRetention
from framework.selection import Selection, check_options, normalization_of, selects_runs
from framework.token_selection.configs import give_own_configs
from framework.token_selection.state import TokenSelection
from framework.token_selection.trainers import refuse_foreign_forward
from framework.training.loss import LossKind, loss_kind

_ATTRIBUTE = "_token_selection"


def enable_token_selection(
    model: nn.Module,
    strategy: str = "supervised",
    ratio: float | str = "labelled",
    retain_linears: bool | Collection[str] = True,
    kv_format: str = "model",
    seed: int = 0,
    tokentune: bool = False,
    normalization: str | None = None,
    correction: float = 0.0,
    fused_loss: bool = False,
    placement: str = "device",
    compile: bool = False,
) -> TokenSelection:
    """Make a model's training token-selective, in place.

    In train mode with labels, the forward value is the ordinary one, `loss` is Σ loss · weight over the selected
    supervised tokens divided by the batch's supervised tokens (or by `num_items_in_batch`), `logits` are those of the
    selected supervised tokens, `[1, rows, vocabulary]`, or None with `fused_loss`, and `loss.backward()` sends gradient
    through selected tokens only. Gradients of parameters go to `.grad` by `backward()`; `torch.autograd.grad` over
    parameters is not supported. In eval mode and under `no_grad` the model behaves as before. Classifiers with one
    label a sequence keep their own loss, and the token that they pool is always selected; where they pool by a mean,
    `supervised` selects all that enter it, which is all. The model gets a config of its own, a copy, and keeps it:
    other models over the same object stay as they are. Blocks that hand a state on from token to token (linear
    attention, state space, short convolution) are replayed from the state at the first selected token if the options
    select neighbours: `suffix`, and `supervised` with `"labelled"`; otherwise they fall back. Position in the order of
    transforms: after adapters, before sharding.

    Args:
        model: a Hugging Face causal LM, masked LM or classifier with blocks, or a PEFT model around one.
        strategy: `supervised` (all labelled tokens, and context up to `ratio`), `uniform`, `bernoulli` or `suffix`
            (the end of every document, which is biased).
        ratio: selected tokens over non-padding tokens, or `"labelled"`: labelled tokens only.
        retain_linears: keep linear outputs at selected rows, so that the backward pass recomputes no matrix product but
            those of `lora_B`; a list of names within a block, such as `["down_proj", "self_attn.o_proj"]`, keeps those
            alone, and `["*"]` all.
        kv_format: how keys and values of all tokens are kept, `model`, `int8` or `int4`; int4 changes the gradient
            by several hundredths. `recompute` keeps the blocks' inputs, and computes keys and values again.
        seed: seed of the draws.
        tokentune: with `uniform`, force the first and the last token, as TokenTune does.
        normalization: `supervised`: unbiased, each loss weighted by the inverse of its probability; `selected`: mean
            over the selected supervised tokens, as TokenTune does. None: `selected` for `suffix`, which has no other,
            and `supervised` for the rest.
        correction: from 0 to 1, how much of the bias of a causal model's gradient is removed. The gradient that a key
            and its value get from the queries of other tokens is multiplied by 1 + correction · (1/π - 1), π being the
            probability of their token. With 1 and independent draws (`bernoulli`) the mean gradient over all
            selections is the ordinary one: a gradient's path moves to earlier tokens only, so it enters each token
            at most once. Draws without replacement are independent up to their fixed count. The price is variance.
        fused_loss: take the loss inside of the head, some rows at a time, so that no more logits than theirs ever
            exist. `logits` is then None, and a loss has one backward pass. A head that is quantised, has an adapter or
            is no plain linear layer makes logits all the same. Classifiers with one label a sequence do without.
        placement: where blocks keep what their replay needs, `device` or `host`: in pinned memory of the host, copied
            there beside the computation, and fetched back one block ahead. Gradients are the same to the bit. Blocks
            that fall back keep their input on the device.
        compile: run blocks through torch.compile, but for attention and layers that keep something for the replay.
            DeepSpeed's stage 3 has hooks inside of blocks, which cannot be traced.

    Returns:
        The state that is now on the model.

    Raises:
        ValueError: an option has no meaning, the model is of another kind, has no blocks, or is enabled already.
    """
    check_options(strategy, ratio, tokentune, normalization)
    if not 0 <= correction <= 1:
        raise ValueError(f"selection.correction: {correction} is not between 0 and 1")
    inner = unwrapped(model)
    if _ATTRIBUTE in vars(inner):
        raise ValueError(
            "token selection is enabled on this model already: call framework.disable_token_selection first"
        )
    refuse_foreign_forward(inner.forward)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(model.active_peft_config).__name__} trains tokens or keys and values before the prompt, which "
            "carry no label: token selection takes them for constants, so they would not learn; use LoRA"
        )
    if correction and loss_kind(inner) is not LossKind.CAUSAL:
        raise ValueError(
            "selection.correction: only causal language models have a correction: where tokens see later ones, a "
            "gradient's path can leave a token and come back, and its probability is no product over the tokens"
        )
    retention = SelectiveRetention(
        inner,
        retain_linears=retain_linears,
        kv_format=kv_format,
        placement=placement,
        correction=correction,
        runs=selects_runs(strategy, ratio),
        compile=compile,
    )
    state = TokenSelection(
        inner,
        retention,
        strategy=strategy,
        ratio=ratio,
        seed=seed,
        tokentune=tokentune,
        normalization=normalization or normalization_of(strategy),
        fused_loss=fused_loss,
    )
    give_own_configs(model)
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
