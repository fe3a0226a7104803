"""What a training step costs under each retention policy, measured on given models and batches.

Every arm takes the same step (forward, backward, AdamW with learning rate 0) on the same weights and batch. Arms take
turns, so that noise of the machine meets all alike, and a time ratio is the median over rounds of the ratio within a
round. Bytes are taken in a separate step, above weights, optimiser state and inputs. Two depths tell what a block
keeps from what embedding, head and loss keep.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch
from best_exact import apply_best_checkpointing
from torch import Tensor, nn

from framework import enable_token_selection, fixed_selection
from framework.data import Batch
from framework.models.products import ModelProducts, matrix_products
from framework.retention import apply_checkpointing, blocks_of, compile_blocks
from framework.selection import Selection, supervised_positions
from framework.training.flops import Flops, FlopTally
from framework.training.loss import exact_loss, unwrapped
from framework.training.memory import CpuMemoryTracker, reset_device_peak


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to take a step. The strategy tells what a selective block may expect; the batch has its selections."""

    policy: str
    ratio: float = 1.0
    retain_linears: bool = False
    kv_format: str = "model"
    strategy: str = "uniform"
    placement: str = "device"
    compile: bool = False

    @property
    def name(self) -> str:
        """As printed."""
        compiled = " compiled" if self.compile else ""
        if self.policy != "selective":
            return self.policy + compiled
        strategy = "" if self.strategy == "uniform" else f" {self.strategy}"
        kept = f"{' +linears' if self.retain_linears else ''} kv={self.kv_format}"
        host = " on host" if self.placement == "host" else ""
        return f"selective{strategy} r={self.ratio:g}{kept}{host}{compiled}"

    def ideal_units(self, *, adapter: bool) -> float:
        """Matrix work in units of one forward pass; an adapter's frozen weights need no gradient of their own."""
        backward = 1 if adapter else 2
        if self.policy == "all":
            return 1 + backward
        if self.policy in ("checkpoint", "best_exact"):
            return 2 + backward
        return 1 + self.ratio * (backward if self.retain_linears else 1 + backward)


ALL, CHECKPOINT = Arm("all"), Arm("checkpoint")


def default_arms(
    ratios: Sequence[float],
    kv_formats: Sequence[str] = ("model", "int8"),
    strategies: Sequence[str] = ("uniform",),
    *,
    compile: bool = False,
) -> list[Arm]:
    """`all`, `checkpoint`, and `selective` with every combination of its options; then, if asked, all compiled."""
    selective = [
        Arm("selective", ratio, retain_linears, kv_format, strategy)
        for strategy in strategies
        for ratio in ratios
        for retain_linears in (False, True)
        for kv_format in kv_formats
    ]
    arms = [ALL, CHECKPOINT, *selective]
    return [*arms, *(dataclasses.replace(arm, compile=True) for arm in arms)] if compile else arms


@dataclasses.dataclass(frozen=True)
class Row:
    """What one arm took at one depth. Bytes are above weights, optimiser state and inputs.

    Attributes:
        name: the arm's.
        arm: the arm.
        depth: blocks of the model.
        seconds: median step time.
        time_ratio: step time over that of `all` (the first arm if there is no `all`), median over rounds.
        ideal_time_ratio: the same of the blocks' matrix work.
        counted_time_ratio: the same of all operations that run: matrices, attention and head (see `FlopTally`).
        peak_bytes: largest sum of live tensors in forward and backward, gradients included.
        peak_ratio: over that of the same baseline as `time_ratio`.
        kept_bytes: live after the forward, before the backward.
        kept_ratio: over that of `checkpoint` (the first arm if there is none).
        block_kept_bytes: what one more block adds to `kept_bytes`; None with one depth.
        block_kept_ratio: over that of the same baseline as `kept_ratio`; None with one depth.
        outside_kept_bytes: `kept_bytes` without the blocks': embedding, final norm, head, loss; None with one depth.
    """

    name: str
    arm: Arm
    depth: int
    seconds: float
    time_ratio: float
    ideal_time_ratio: float
    counted_time_ratio: float
    peak_bytes: int
    peak_ratio: float
    kept_bytes: int
    kept_ratio: float
    block_kept_bytes: float | None = None
    block_kept_ratio: float | None = None
    outside_kept_bytes: float | None = None


def arm_model(model: nn.Module, arm: Arm) -> nn.Module:
    """A copy of the model's modules, on the same parameters, under the arm's retention policy."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    if arm.policy == "checkpoint":
        apply_checkpointing(unwrapped(result), compile=arm.compile)
    elif arm.policy == "best_exact":
        apply_best_checkpointing(unwrapped(result))
    elif arm.policy == "selective":
        options = {"retain_linears": arm.retain_linears, "kv_format": arm.kv_format, "placement": arm.placement}
        options |= {"compile": arm.compile, "fused_loss": True}
        enable_token_selection(result, strategy=arm.strategy, ratio=arm.ratio, **options)
    elif arm.compile:
        compile_blocks(unwrapped(result))
    return result


def counted(products: ModelProducts, arm: Arm, labels: Tensor, selection: Selection | None) -> Flops:
    """Floating-point operations of an arm's forward and backward pass.

    Args:
        products: of the plain model.
        arm: whose `best_exact` counts as `checkpoint`, although it keeps attention.
        labels: int64 `[batch, sequence]`, without padding.
        selection: None for all tokens.
    """
    policy = "checkpoint" if arm.policy == "best_exact" else arm.policy
    tally = FlopTally(products, policy=policy, retain_linears=arm.retain_linears, kernel="sdpa")
    labels = labels.cpu()
    documents = torch.arange(len(labels))[:, None].expand_as(labels)
    supervised = supervised_positions(labels, causal=True)
    whole = {"attention_mask": torch.ones_like(labels)}
    tally.add(Batch(whole, documents, supervised, int(supervised.sum())), selection)
    return tally.flops()


class Case:
    """One model's weights with their optimiser, a batch, and what every arm makes of them.

    Args:
        model: in train mode, on the device to measure; it stays plain.
        inputs: what it takes, with `labels` int64 `[batch, sequence]`, on the same device.
        selections: the selection of every ratio that an arm has.
        arms: to be measured.
    """

    def __init__(
        self, model: nn.Module, inputs: dict[str, Tensor], selections: dict[float, Selection], arms: Sequence[Arm]
    ) -> None:
        plain = unwrapped(model)
        self.products = matrix_products(plain, blocks_of(plain))
        self.models = {arm: arm_model(model, arm) for arm in arms}
        self.inputs, self.selections = inputs, selections
        self.device = inputs["labels"].device
        self.count = int((inputs["labels"][:, 1:] != -100).sum())
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def loss(self, arm: Arm) -> Tensor:
        """The arm's forward pass."""
        if arm.policy != "selective":
            return exact_loss(self.models[arm], self.inputs, self.count)
        with fixed_selection(self.models[arm], self.selections[arm.ratio]):
            return self.models[arm](**self.inputs, num_items_in_batch=self.count).loss

    def operations(self, arm: Arm) -> int:
        """Floating-point operations of the arm's forward and backward pass, as they run."""
        selection = self.selections[arm.ratio] if arm.policy == "selective" else None
        return counted(self.products, arm, self.inputs["labels"], selection).hardware

    def step(self, arm: Arm) -> float:
        """Take a whole step; its seconds."""
        self._synchronize()
        start = time.perf_counter()
        self.loss(arm).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._synchronize()
        return time.perf_counter() - start

    def measure_bytes(self, arm: Arm) -> tuple[int, int]:
        """Peak bytes of forward and backward, and bytes kept between them, above what exists already."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            reset_device_peak(self.device)
            loss = self.loss(arm)
            kept = torch.cuda.memory_allocated(self.device) - before
            loss.backward()
            peak = torch.cuda.max_memory_allocated(self.device) - before
        else:
            with CpuMemoryTracker() as tracker:
                loss = self.loss(arm)
                kept = tracker.current
                loss.backward()
            peak = tracker.peak
        self.optimizer.zero_grad(set_to_none=True)
        return peak, kept

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_cases(cases: dict[int, Case], arms: Sequence[Arm], *, repeats: int, adapter: bool) -> list[Row]:
    """Rows for every depth and arm, in that order.

    Args:
        cases: by depth.
        arms: in the order of the rows.
        repeats: timed rounds over all depths and arms, after one that is not timed.
        adapter: whether most weights are frozen, for the ideal ratios.
    """
    seconds: dict[tuple[int, Arm], list[float]] = {(depth, arm): [] for depth in cases for arm in arms}
    for turn in range(1 + repeats):
        for depth, arm in seconds:
            taken = cases[depth].step(arm)
            if turn:
                seconds[depth, arm].append(taken)
    memory = {(depth, arm): cases[depth].measure_bytes(arm) for depth, arm in seconds}
    slow, kept = (arm if arm in arms else arms[0] for arm in (ALL, CHECKPOINT))
    low, high = min(cases), max(cases)
    per_block = {arm: (memory[high, arm][1] - memory[low, arm][1]) / (high - low) for arm in arms if low < high}
    rows = []
    for depth, arm in seconds:
        pairs = zip(seconds[depth, arm], seconds[depth, slow], strict=True)
        row = Row(
            name=arm.name,
            arm=arm,
            depth=depth,
            seconds=statistics.median(seconds[depth, arm]),
            time_ratio=statistics.median(mine / baseline for mine, baseline in pairs),
            ideal_time_ratio=arm.ideal_units(adapter=adapter) / slow.ideal_units(adapter=adapter),
            counted_time_ratio=cases[depth].operations(arm) / cases[depth].operations(slow),
            peak_bytes=memory[depth, arm][0],
            peak_ratio=memory[depth, arm][0] / memory[depth, slow][0],
            kept_bytes=memory[depth, arm][1],
            kept_ratio=memory[depth, arm][1] / memory[depth, kept][1],
        )
        if per_block:
            row = dataclasses.replace(
                row,
                block_kept_bytes=per_block[arm],
                block_kept_ratio=per_block[arm] / per_block[kept],
                outside_kept_bytes=row.kept_bytes - depth * per_block[arm],
            )
        rows.append(row)
    return rows
