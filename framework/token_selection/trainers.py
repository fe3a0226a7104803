"""What transformers' Trainer, TRL and Accelerate do to a model, and what token selection needs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from framework.token_selection.state import TokenSelection

FUSED_HEAD = "fused_lm_head"
"""The argument by which TRL's trainers, from 1.16 on, ask for losses per token instead of logits."""


class TokenSelectionCallback(TrainerCallback):
    """Ties the draws of `transformers.Trainer` and TRL's trainers to the optimiser step.

    With it a resumed run draws what an uninterrupted one would have drawn. Strategy `supervised` with ratio
    `"labelled"` draws nothing and does without.

    Args:
        selection: what `framework.enable_token_selection` returned.
    """

    def __init__(self, selection: TokenSelection) -> None:
        self.selection = selection

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Number the documents of the coming step from the step's own number."""
        self.selection.start_step(state.global_step)


def refuse_foreign_forward(forward: Callable[..., Any]) -> None:
    """Refuse a forward that stands in place of the model's own, if token selection cannot work in it.

    Raises:
        ValueError: it is that of a TRL whose chunked loss takes the place of the logits for every caller.
    """
    code, names = forward.__func__.__code__, forward.__func__.__globals__
    if names["__name__"].startswith("trl.") and FUSED_HEAD not in code.co_varnames:
        raise ValueError("the chunked loss of this version of TRL does not go with token selection: use trl>=1.16")


def refuse_foreign_arguments(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Refuse a forward pass for training whose loss token selection cannot follow, saying what to set.

    Args:
        model: the model whose forward was called.
        inputs: the arguments by name.

    Raises:
        ValueError: no labels; labels shifted by the caller; a cache of keys and values; logits of some rows only; a
            replica of `nn.DataParallel`.
    """
    if inputs.get("labels") is None:
        if inputs.get("shift_labels") is not None:
            raise ValueError(
                "token selection takes unshifted labels, but forward got shift_labels: sequence and context "
                "parallelism do not go with it"
            )
        raise ValueError(
            "token selection is enabled, but forward got no labels, which the selection and the loss need: pass "
            "labels (a trainer takes them away for a loss of its own: set label_smoothing_factor=0, and no "
            "compute_loss_func), or call framework.disable_token_selection(model) first"
        )
    caches = [name for name in ("past_key_values", "cache_params") if inputs.get(name) is not None]
    if caches:
        raise ValueError(
            "token selection keeps keys, values and states itself and cannot send gradient into a cache of them, but "
            f"forward got {caches[0]}: leave it out and pass whole sequences, with labels of -100 on what is not to be "
            "learned"
        )
    keep = inputs.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep != 0:
        raise ValueError(
            "token selection forms the logits of the selected tokens that carry a label, but forward got "
            f"logits_to_keep={keep!r}: leave it out and set the labels to -100 where no loss is wanted"
        )
    if getattr(model, "_is_replica", False):
        raise ValueError(
            "nn.DataParallel, which Trainer uses when one process sees several GPUs, does not go with token "
            "selection: launch with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
