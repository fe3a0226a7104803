"""From a micro-batch to its share of the window's loss: what is selected, what it is divided by."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from framework.config import Config
from framework.data import Batch
from framework.errors import UserError
from framework.models.products import matrix_products
from framework.models.wrapping import unwrapped
from framework.retention import apply_checkpointing, blocks_of, compile_blocks, head_reads
from framework.selection import Selection, select
from framework.token_selection import enable_token_selection, fixed_selection
from framework.training.flops import Flops, FlopTally
from framework.training.loss import exact_loss


class Objective:
    """The loss that a config describes.

    Applies the config's retention policy to the model, in place: the transform after adapters, before the engine.

    Args:
        model: with its adapter; changed in place.
        config: of the run.
        device: that the model will compute on.

    Attributes:
        tally: counts the floating-point operations of the micro-batches that `loss` is called for.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        self._fallbacks: dict[str, str] = {}
        inner = unwrapped(model)
        self.tally = FlopTally(
            matrix_products(inner, blocks_of(inner)),
            policy=config.retention.policy,
            retain_linears=config.retained_linears,
            kernel=config.model.attention,
        )
        if config.retention.policy == "selective":
            strategy, ratio = effective_selection(config)
            enabled = enable_token_selection(
                model,
                strategy=strategy,
                ratio=ratio,
                retain_linears=config.retained_linears,
                kv_format=config.retention.kv_format,
                placement=config.retention.placement,
                seed=config.run.seed,
                tokentune=config.selection.tokentune,
                normalization=config.resolved_normalization,
                correction=config.selection.correction,
                fused_loss=True,
                compile=config.training.compile,
            )
            self._fallbacks = enabled.retention.fallbacks
        elif config.retention.policy == "checkpoint":
            apply_checkpointing(inner, compile=config.training.compile)
        elif config.training.compile:
            compile_blocks(inner)

    def select(self, batch: Batch) -> Selection | None:
        """The tokens of a micro-batch that receive gradient; None for all of them, by ordinary autograd."""
        return draw_selection(self._config, batch)

    def denominator(self, batch: Batch, selection: Selection | None) -> int:
        """What a micro-batch adds to the number that the window's loss is divided by."""
        if selection is None or self._config.resolved_normalization == "supervised":
            return batch.supervised_tokens
        return int((batch.supervised & selection.mask(batch.supervised.shape[1])).sum())

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Check that a classifier's head reads what the batches say, before gradient is left out elsewhere.

        Args:
            model: the engine's.
            batch: any; its first sample is run.

        Raises:
            UserError: the head reads tokens that `batch.supervised` does not name: they would be taken for constants.
        """
        if batch.pooled is None or self._config.retention.policy != "selective":
            return
        first = {name: tensor[:1] for name, tensor in batch.inputs.items() if name != "labels"}
        inner, inputs = unwrapped(model), move(first, self._device)
        named = batch.supervised[:1].to(self._device)
        reads_named, reads_others = head_reads(inner, inputs, named), head_reads(inner, inputs, ~named)
        if reads_others or not reads_named:
            raise UserError(
                f"model.task: the classifier of {inner.config.model_type} reads other tokens than the one taken for "
                'its pooled token, so their gradient would be lost: set selection.strategy to "none" and '
                'retention.policy to "all" or "checkpoint"'
            )

    def flops(self) -> Flops:
        """Floating-point operations of the micro-batches since `tally.reset`, on this rank."""
        return self.tally.flops(self._fallbacks)

    def loss(self, model: nn.Module, batch: Batch, selection: Selection | None, count: int) -> Tensor:
        """The micro-batch's share of the window's loss, a scalar with a graph.

        Args:
            model: the engine's.
            batch: the micro-batch.
            selection: from `select`.
            count: sum of `denominator` over the window, all micro-batches and ranks.
        """
        self.tally.add(batch, selection)
        inputs = move(batch.inputs, self._device)
        if selection is None:
            return exact_loss(model, inputs, count)
        with fixed_selection(model, selection):
            return model(**inputs, num_items_in_batch=count).loss


def move(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors on another device, without waiting for the copies."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def draw_selection(config: Config, batch: Batch) -> Selection | None:
    """Draw the tokens of a micro-batch that receive gradient, by document; None if blocks are not selective."""
    if config.retention.policy != "selective":
        return None
    strategy, ratio = effective_selection(config)
    selection = select(
        strategy=strategy,
        ratio=ratio,
        supervised=batch.supervised,
        documents=batch.documents,
        seed=config.run.seed,
        tokentune=config.selection.tokentune,
    )
    return selection if batch.pooled is None else selection.including(batch.pooled)


def effective_selection(config: Config) -> tuple[str, float | str]:
    """Strategy and ratio of selective blocks: exact training through record and replay selects everything."""
    if config.selection.strategy == "none":
        return "supervised", 1.0
    return config.selection.strategy, config.resolved_ratio
