"""Floating-point operations of a step, counted for the tokens that were in it.

Two numbers, after PaLM (arXiv 2204.02311, appendix B) and Korthikanti et al. (arXiv 2205.05198, section 6.3):

- **model** operations are what the chosen gradient needs, whoever computes it: the forward pass over all tokens, and
  for the tokens that receive gradient twice as much again (their inputs' gradient and the weights'), or once where the
  weights are frozen. Padding does not count, nor does anything computed a second time. In attention a query counts
  with the keys that the mask lets it see in its own document, so a causal document of n tokens has n (n + 1) / 2 pairs
  (PaLM counts n²); the gradient of keys and values counts for selected ones only, the others being constants.
- **hardware** operations are what runs: padding, the recomputation of checkpointed blocks and of replays, and pairs
  that the attention kernel computes only to mask them.

Model FLOP utilisation (MFU) and hardware FLOP utilisation (HFU) are these over what the devices could have done in the
same time. Two conventions: every linear layer is taken to need its input's gradient, although the first ones above a
frozen embedding do not; and recomputation is taken to repeat a whole block, although torch's checkpointing stops before
the last product where no later operator needs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.data import Batch
from framework.models.products import BlockProducts, ModelProducts, Products, Reach
from framework.selection import Selection


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply-add counted as two; see the module."""

    model: int
    hardware: int


@dataclass(frozen=True)
class Pairs:
    """Query-key pairs of one attention call.

    Attributes:
        all: a query and a key that it sees.
        queries: those whose query is selected.
        both: those whose query and key are selected.
        executed: pairs that the kernel computes for all queries.
        replayed: the same for the selected queries.
    """

    all: int = 0
    queries: int = 0
    both: int = 0
    executed: int = 0
    replayed: int = 0

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Rows:
    """Rows of one or more micro-batches.

    Attributes:
        tokens: that are not padding.
        selected: tokens that receive gradient.
        head: rows that logits are made of.
        executed: rows of the tensors, padding included.
        replayed: rows that a replay computes.
    """

    tokens: int = 0
    selected: int = 0
    head: int = 0
    executed: int = 0
    replayed: int = 0

    def __add__(self, other: Rows) -> Rows:
        return Rows(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class FlopTally:
    """Adds up the operations of micro-batches as they are run.

    Args:
        products: of the model.
        policy: the config's `retention.policy`.
        retain_linears: the config's `retention.retain_linears`.
        kernel: the config's `model.attention`. `eager` computes every pair of the batch's tensors; `sdpa` does too
            where it is given a mask, which transformers leaves out for batches without padding, packing or a window
            that matters, and which selective blocks do without; other kernels are taken to compute no pair in vain.

    Attributes:
        batch: the last micro-batch, for messages.
        selection: its selection.
    """

    def __init__(
        self, products: ModelProducts, *, policy: str, retain_linears: bool | Collection[str], kernel: str
    ) -> None:
        self.products, self.policy, self.retain_linears, self.kernel = products, policy, retain_linears, kernel
        self.batch: Batch | None = None
        self.selection: Selection | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the micro-batches so far."""
        self._rows = Rows()
        self._pairs = {block.attention.reach: Pairs() for block in self.products.blocks if block.attention}

    def add(self, batch: Batch, selection: Selection | None) -> None:
        """Count one micro-batch, with its tensors on the CPU.

        Args:
            batch: what is run.
            selection: the tokens that receive gradient; None for all.
        """
        self.batch, self.selection = batch, selection
        shape = batch.documents.shape
        real = batch.documents >= 0
        chosen = real if selection is None else selection.mask(shape[1]).cpu()
        supervised = batch.supervised if batch.pooled is None else batch.pooled
        # Retention keeps one row alive even where nothing is selected.
        replayed = shape.numel() if selection is None else max(1, selection.selected_tokens)
        self._rows += Rows(
            tokens=int(real.sum()),
            selected=int((chosen & real).sum()),
            head=int((supervised if selection is None else supervised & chosen).sum()),
            executed=shape.numel(),
            replayed=replayed,
        )
        slots = shape[1] if selection is None else selection.positions.shape[1]
        masked = "attention_mask" not in batch.inputs or not bool(batch.inputs["attention_mask"].all())
        for reach in self._pairs:
            seen, queries, both = seen_pairs(batch.documents, chosen, reach)
            executed, replayed = shape.numel() * shape[1], shape[0] * slots * shape[1]
            limit = min(reach.window or shape[1], reach.chunk or shape[1])
            triangle = shape[0] * shape[1] * (shape[1] + 1) // 2
            if self.kernel not in ("eager", "sdpa"):
                executed, replayed = seen, queries
            elif self.kernel == "sdpa" and self.policy == "selective":
                # Selective blocks take no mask: padding after causal rows changes nothing, and packed padding is one
                # more document.
                packed = batch.documents.where(real, int(batch.documents.max()) + 1)
                padded = "attention_mask" in batch.inputs and reach.causal and limit >= shape[1]
                executed = triangle if padded else seen if bool(real.all()) else seen_pairs(packed, chosen, reach)[0]
                replayed = queries
            elif self.kernel == "sdpa" and not masked and reach.causal and limit >= shape[1]:
                executed = triangle
                replayed = executed if selection is None else replayed
            self._pairs[reach] += Pairs(seen, queries, both, executed, replayed)

    def flops(self, recomputed_whole: Iterable[str] = ()) -> Flops:
        """The operations of the micro-batches since the last reset, on this rank.

        Args:
            recomputed_whole: blocks that selective retention recomputes on all rows (its `fallbacks`).
        """
        whole = set(recomputed_whole)
        model = hardware = 0
        for block in self.products.blocks:
            model += self._block_model(block, exact=block.name in whole)
            hardware += self._block_hardware(block, exact=block.name in whole)
        differentiated = any(block.differentiated for block in self.products.blocks)
        outside = _outside(self.products.head, self._rows.head, differentiated)
        model += outside + _outside(self.products.body, self._rows.tokens, differentiated)
        hardware += outside + _outside(self.products.body, self._rows.executed, differentiated)
        return Flops(2 * model, 2 * hardware)

    def _block_model(self, block: BlockProducts, *, exact: bool) -> int:
        """Multiply-adds that the chosen gradient needs."""
        rows, selective = self._rows, self.policy == "selective" and not exact
        products, pairs, pair = block.products, *self._pairs_of(block)
        total = products.forward * rows.tokens + pair * pairs.all
        if block.differentiated:
            selected = rows.selected if selective else rows.tokens
            total += (products.forward + products.trained) * selected
            # The gradient of scores and queries goes by selected queries, that of keys and values by selected keys.
            total += pair * (pairs.queries + pairs.both if selective else 2 * pairs.all)
        return total

    def _block_hardware(self, block: BlockProducts, *, exact: bool) -> int:
        """Multiply-adds that run."""
        rows, selective = self._rows, self.policy == "selective" and not exact
        products, pairs, pair = block.products, *self._pairs_of(block)
        total = products.forward * rows.executed + pair * pairs.executed
        if not block.differentiated:
            return total
        again, again_pairs = (rows.replayed, pairs.replayed) if selective else (rows.executed, pairs.executed)
        # A replay that is not the kernel's own has gradients of selected keys and values only.
        keys_pairs = pairs.both if selective and self.kernel != "eager" else again_pairs
        total += (products.forward + products.trained) * again + pair * (again_pairs + keys_pairs)
        if self.kernel != "eager" and block.attention is not None:
            # Fused kernels keep no scores: their backward pass computes them once more (arXiv 2307.08691, 2.3.2).
            total += block.attention.heads * block.attention.key_size * again_pairs
        if self.policy == "checkpoint" or exact:
            total += products.forward * again + pair * again_pairs
        elif selective:
            kept = block.retained(self.retain_linears)
            known = bool(self.retain_linears) and self.kernel != "eager"
            total += (products.forward - kept) * again + pair * (0 if known else again_pairs)
        return total

    def _pairs_of(self, block: BlockProducts) -> tuple[Pairs, int]:
        """The block's pairs, and the multiply-adds of one."""
        if block.attention is None:
            return Pairs(), 0
        return self._pairs[block.attention.reach], block.attention.pair


def _outside(products: Products, rows: int, differentiated: bool) -> int:
    """Multiply-adds of matrices that ordinary autograd goes through: forward, inputs' gradient, weights' gradient."""
    return rows * (products.forward * (2 if differentiated else 1) + products.trained)


def seen_pairs(documents: Tensor, chosen: Tensor, reach: Reach) -> tuple[int, int, int]:
    """Query-key pairs that a mask leaves within documents.

    Args:
        documents: int64 `[batch, sequence]`, index of each token's document, contiguous within a row; -1 is padding.
        chosen: bool of the same shape, the selected tokens.
        reach: what the mask lets a query see.

    Returns:
        All pairs; those with a selected query; those with a selected query and a selected key.
    """
    rows, tokens = documents.shape
    place = torch.arange(rows * tokens)
    begins = torch.ones(rows, tokens + 1, dtype=torch.bool)
    begins[:, 1:-1] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(begins[:, :-1].flatten(), place, 0).cummax(0).values
    last = place
    if not reach.causal:
        last = torch.where(begins[:, 1:].flatten(), place, rows * tokens).flip(0).cummin(0).values.flip(0)
    if reach.window is not None:
        first = torch.maximum(first, place - reach.window + int(reach.causal))
        last = torch.minimum(last, place + reach.window)
    if reach.chunk is not None:
        first = torch.maximum(first, place - place % tokens % reach.chunk)
    real = documents.flatten() >= 0
    queries = chosen.flatten() & real
    seen = last - first + 1
    before = torch.nn.functional.pad(queries.cumsum(0), (1, 0))
    both = before[last + 1] - before[first]
    return int(seen[real].sum()), int(seen[queries].sum()), int(both[queries].sum())


def utilisation(flops: Flops, *, seconds: float, peak: float | None) -> dict[str, Any]:
    """The keys of a `TrainRecord` that tell what the devices did.

    Args:
        flops: of the step, all ranks.
        seconds: that it took.
        peak: floating-point operations a second of all devices together; None where it is not known.
    """
    done = None if peak is None else seconds * peak
    return {
        "model_flops": flops.model,
        "hardware_flops": flops.hardware,
        "mfu": None if done is None else flops.model / done,
        "hfu": None if done is None else flops.hardware / done,
    }
