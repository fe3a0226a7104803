"""Seconds of an optimiser step, predicted from what it computes, moves and exchanges. Must not import torch.

A pass takes as long as its products and its memory-bound operators after each other (`framework.planner.work`), and at
least as long as the host needs to issue it. Exchanges between ranks and copies between host and device go on behind a
pass where the engine lets them: a pass over L blocks is a pipeline of L equal stages, of which the first exchange and
the last computation have nothing beside them. What retention sends to the host and fetches back goes over the same
link as other host copies, a block's beside another's computation, so that a pass takes longer only where the link is
busy for longer than the pass. Everything else is added up.

Left out are the data's way to the device, evaluations, checkpoints, waiting for a slower rank, and what host and device
do less well side by side than apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from framework.planner.choice import Choice
from framework.planner.exchange import Transfers, holders, reduces_once
from framework.planner.rates import Rates
from framework.planner.work import CAST, Job, Work, WorkModel
from framework.sharding.precision import PRECISIONS

ADAMW_BYTES = 28
"""A float32 weight and its moments are read and written, its gradient read: torch's fused AdamW."""

STOCHASTIC_BYTES = 216
"""What the operators of `StochasticAdamW` read and write per bfloat16 weight, among them 3 x 34 for rounding."""

STOCHASTIC_KERNELS = 34
"""What `StochasticAdamW` and clipping have the host issue for a tensor or a chunk of one: 50 operators, of which it is
as long at 88 as at the 60 kernels of a Llama block."""

EIGHT_BIT_KERNELS = 4
"""The same of `EightBitAdamW`, whose update is one kernel."""

CHUNK = 1 << 24
"""As in `framework.training.optimizer`, which imports torch."""

EIGHT_BIT_BYTES = 8 + 4 + 4 + 16 / 256
"""The same as for AdamW with moments of 8 bits and the scales of 256 of them (arXiv 2110.02861)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step, and the tokens in it.

    Attributes:
        forward: passes.
        backward: passes, recomputation apart.
        recomputation: of checkpointed blocks and replays.
        update: clipping and the optimiser, on the device or the host; gradients' sums over micro-batches.
        exchange: between ranks, as far as ranks wait for it.
        host_copies: between host and device, as far as they are waited for.
        hidden: both kinds, as far as they go on behind a pass; no part of the total.
        tokens: of all ranks and micro-batches.
    """

    forward: float
    backward: float
    recomputation: float
    update: float
    exchange: float
    host_copies: float
    hidden: float
    tokens: int

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name, which add up to the total."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:6]}

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.forward + self.backward + self.recomputation + self.update + self.exchange + self.host_copies

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job, padding included."""
        return self.tokens / self.total


class TimeModel:
    """Predicts the step of every choice of a job.

    Args:
        job: what the choices have in common.
        sent: gives the bytes that a micro-batch's retention sends to the host, with a choice.
    """

    def __init__(self, job: Job, sent: Callable[[Choice], float] = lambda choice: 0.0) -> None:
        self.job, self.work, self._sent = job, WorkModel(job), sent
        self._precision = PRECISIONS[job.precision]
        self._known: dict[tuple[object, ...], tuple[Work, Work, Work]] = {}

    def step(self, choice: Choice, rates: Rates) -> StepTime:
        """The time of one optimiser step.

        Args:
            choice: how the job is run.
            rates: of the hardware that it runs on.
        """
        transfers = Transfers(self.job, self.work.compute_bytes(choice), choice, rates)
        count, blocks = choice.accumulation, len(self.job.products.blocks)
        forward, again, backward = (_seconds(work, choice, rates) for work in self._passes(choice))
        forward += transfers.gather_traffic / rates.memory_bytes
        backward += transfers.backward_traffic / rates.memory_bytes
        waited = copied = hidden = 0.0
        sent = self._sent(choice) / rates.link_bytes
        passes: tuple[tuple[float, float, float, float], ...] = (
            (forward, transfers.forward, transfers.forward_copies, sent),
            # The last block's are on the device still.
            (again + backward, transfers.backward, transfers.backward_copies, sent * (blocks - 1) / blocks),
        )
        for compute, exchanged, copies, retained in passes:
            exposed = 0.0
            if beside := exchanged + copies:
                exposed = _pipeline(compute, beside, blocks) - compute
                waited += exposed * exchanged / beside
                copied += exposed * copies / beside
                hidden += beside - exposed
            longer = max(0.0, copies + retained - compute - exposed)
            copied += longer
            hidden += retained - longer
        return StepTime(
            forward=count * forward,
            backward=count * backward,
            recomputation=count * again,
            update=self._update(choice, rates) + (count - 1) * self._sum(choice, rates),
            exchange=count * (waited + transfers.after_backward) + transfers.once,
            host_copies=count * (copied + transfers.copies_after_backward) + transfers.copies_once,
            hidden=count * hidden,
            tokens=choice.ranks * choice.micro_batch_size * count * self.job.sequence_length,
        )

    def _passes(self, choice: Choice) -> tuple[Work, Work, Work]:
        """Forward, recomputation, backward; the same for many choices that differ in who holds what."""
        key = (
            choice.policy,
            choice.retain_linears,
            choice.strategy,
            choice.ratio,
            choice.micro_batch_size,
            self.work.under_autocast(choice),
        )
        if key not in self._known:
            work = self.work
            self._known[key] = work.forward(choice), work.recomputation(choice), work.backward(choice)
        return self._known[key]

    def _update(self, choice: Choice, rates: Rates) -> float:
        """Clipping, the optimiser, and where there is a 16-bit copy of the weights, that."""
        width = self._precision.weight_bytes
        rule: float = STOCHASTIC_BYTES if self._precision.stochastic_rounding else ADAMW_BYTES
        if self.job.optimizer == "adamw_8bit":
            rule = EIGHT_BIT_BYTES
        # The norm reads the gradients; scaling, which is taken to happen at every step, reads and writes them.
        moved = rule + 3 * width
        if choice.zero_stage and width > self.work.compute_bytes(choice):
            moved += CAST
        if choice.offload_optimizer and choice.zero_stage == 3:
            # From the buffer that they are summed up in, which is on the host too.
            moved += 2 * width
        issued = self._kernels(choice) * rates.kernel_seconds
        return max(issued, moved * self._held(choice) / self._home(choice, rates))

    def _kernels(self, choice: Choice) -> float:
        """Operators that an update issues: torch's AdamW a few in all, others some for each tensor or piece of one."""
        if self.job.optimizer == "adamw_8bit":
            return EIGHT_BIT_KERNELS * self.job.trained_tensors
        if not self._precision.stochastic_rounding:
            return 0
        # Stages of ZeRO update a flat tensor for each group.
        tensors = 0 if choice.zero_stage else self.job.trained_tensors
        return STOCHASTIC_KERNELS * (tensors + self._held(choice) / CHUNK)

    def _sum(self, choice: Choice, rates: Rates) -> float:
        """Adding a micro-batch's gradients to those before it: two are read, one is written."""
        whole = reduces_once(choice, self.job.precision)
        held: float = self.job.trainable if whole else self._held(choice)
        # Stage 3 brings its sums to the device to add to them.
        home = rates.memory_bytes if choice.zero_stage == 3 else self._home(choice, rates)
        return 3 * self._precision.weight_bytes * held / home

    def _held(self, choice: Choice) -> float:
        """Trainable parameters that a rank updates."""
        return self.job.trainable / holders(choice)

    def _home(self, choice: Choice, rates: Rates) -> float:
        """Bytes a second where a rank's part of the optimiser is."""
        if not choice.offload_optimizer:
            return rates.memory_bytes
        return rates.host_memory_bytes / min(choice.ranks, rates.ranks_per_node)


def _seconds(work: Work, choice: Choice, rates: Rates) -> float:
    """Of a pass alone. With few rows products take as long as reading the weights."""
    selective = choice.policy == "selective"
    attention = work.attention / (rates.attention_flops if selective else rates.masked_attention_flops)
    products = max(work.matrices / rates.matrix_flops, work.weights / rates.memory_bytes)
    device = products + attention + work.moved / rates.operator_bytes
    return max(device, work.kernels * rates.kernel_seconds)


def _pipeline(compute: float, beside: float, blocks: int) -> float:
    """Seconds of a pass whose every block waits for its part of what goes on beside it."""
    return max(compute, beside) + min(compute, beside) / blocks
