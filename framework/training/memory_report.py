"""When memory runs out: what held it, and what to change."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from framework.config import Config
from framework.errors import RunError, UserError
from framework.retention import KV_FORMATS
from framework.sharding.protocol import Engine
from framework.training.flops import FlopTally
from framework.training.memory import CpuMemoryTracker, device_peak_memory
from framework.training.predicted import advice, held_by_kind, requested_bytes
from framework.training.progress import format_bytes

HISTORY_ENTRIES = 200_000
"""Allocations and frees that are remembered; about a kilobyte each in a snapshot."""

LISTED_TENSORS = 30


class Allocator(Protocol):
    """What is asked of the device's allocator."""

    def record_history(self) -> None:
        """Remember from now on where every piece of memory was allocated."""

    def dump(self, path: Path) -> None:
        """Write what is allocated, and what is remembered, for https://pytorch.org/memory_viz."""

    def summary(self) -> str:
        """Its counters, as a table."""

    def state(self) -> str:
        """Peak and capacity in one line."""


class CudaAllocator:
    """torch's caching allocator of CUDA memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record_history(self) -> None:
        """Python stack traces only: symbols of C++ frames would take seconds to find."""
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES, stacks="python", device=self._device)

    def dump(self, path: Path) -> None:
        """See `Allocator.dump`."""
        torch.cuda.memory._dump_snapshot(str(path))

    def summary(self) -> str:
        """See `Allocator.summary`."""
        return torch.cuda.memory_summary(self._device)

    def state(self) -> str:
        """See `Allocator.state`."""
        _, total = torch.cuda.mem_get_info(self._device)
        allocated = torch.cuda.max_memory_allocated(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        return f"peak {format_bytes(allocated)} allocated, {format_bytes(reserved)} reserved of {format_bytes(total)}"


def allocator_of(device: torch.device) -> Allocator | None:
    """The device's allocator; None where it cannot be asked anything (CPU)."""
    return CudaAllocator(device) if device.type == "cuda" else None


class MemoryWatch:
    """Turns an out-of-memory error into a message that helps, with a report beside it, and writes snapshots.

    Made before the model is placed on the device, so that snapshots know where weights were allocated, too.

    Args:
        config: of the run.
        directory: where reports and snapshots go.
        device: that the run computes on.
        tally: knows the last micro-batch.
        rank: of this process; the files of others than the first have it in their names.
        plan: what `plan.json` is to hold.

    Raises:
        UserError: a snapshot is asked for on a device that has none.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        device: torch.device,
        tally: FlopTally,
        rank: int = 0,
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self._config, self._directory, self._device, self._tally = config, directory, device, tally
        self._plan = plan
        self._engine: Engine | None = None
        self._tracker: CpuMemoryTracker | None = None
        self._suffix = f"-rank-{rank}" if rank else ""
        self._allocator = allocator = allocator_of(device)
        self._snapshot = config.logging.memory_snapshot
        if self._snapshot:
            if allocator is None:
                raise UserError(
                    f"logging.memory_snapshot: only CUDA devices have one, and this run is on {device}; set it to false"
                )
            allocator.record_history()

    def placed(self, engine: Engine, tracker: CpuMemoryTracker | None) -> None:
        """Know from now on what the engine holds, and who counts the bytes of a CPU."""
        self._engine, self._tracker = engine, tracker

    def end_step(self, step: int) -> None:
        """Write the snapshot that was asked for after this step."""
        if self._allocator is not None and self._snapshot is not True and step == self._snapshot:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._allocator.dump(self._directory / f"step-{step:08}{self._suffix}.pickle")

    @contextmanager
    def guard(self, place: str, phase: str = "step") -> Iterator[None]:
        """Within this context an out-of-memory error becomes a `RunError`.

        Args:
            place: what runs, such as `step 12`.
            phase: what it needs memory for: `placing` the model, a `step` of training, or `evaluation`.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RunError(self._explain(place, phase, error)) from error

    def _explain(self, place: str, phase: str, error: torch.OutOfMemoryError) -> str:
        what = f"{place}: out of memory on {self._device}{self._batch() if phase == 'step' else ''}"
        written = self._write(place, what, error)
        lines = [what]
        if self._allocator is not None:
            lines[0] += f"; {self._allocator.state()}"
        lines.append(f"  {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        lines += [f"  {line}" for line in self._planned(error, phase)]
        lines += [f"  to try: {option}" for option in options_to_change(self._config, phase)]
        lines += [f"  {line}" for line in written]
        return "\n".join(lines)

    def _planned(self, error: torch.OutOfMemoryError, phase: str) -> list[str]:
        """What the plan says, which is about steps and the model's place, not about evaluations."""
        if self._plan is None or phase == "evaluation":
            return []
        try:
            held = None if self._engine is None else held_by_kind(self._engine.held(), self._device)
        except Exception:
            # In the middle of a step an engine may not know, which must not hide the error itself.
            held = None
        return advice(self._plan, held, self._reached(), requested_bytes(error))

    def _reached(self) -> int | None:
        """Peak bytes of the step so far."""
        if (peak := device_peak_memory(self._device)) is not None:
            return peak.allocated
        return None if self._tracker is None else self._tracker.peak

    def _batch(self) -> str:
        """The last micro-batch of training."""
        batch = self._tally.batch
        if batch is None:
            return ""
        rows, tokens = batch.documents.shape
        chosen = self._tally.selection
        selected = batch.tokens if chosen is None else chosen.selected_tokens
        return f", micro-batch of {rows} x {tokens} tokens, {selected} selected"

    def _write(self, place: str, what: str, error: torch.OutOfMemoryError) -> list[str]:
        """Leave what can be known in files; a full disk must not hide the error itself."""
        name = f"out-of-memory-{place.replace(' ', '-')}{self._suffix}"
        lines = []
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            report = self._directory / f"{name}.txt"
            parts = [what, str(error), largest_tensors(self._device)]
            if self._allocator is not None:
                parts.insert(2, self._allocator.summary())
            report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
            lines.append(f"report: {report}")
            if self._allocator is not None:
                snapshot = report.with_suffix(".pickle")
                self._allocator.dump(snapshot)
                advice = "" if self._snapshot else "; with where each was allocated if logging.memory_snapshot is true"
                lines.append(f"snapshot: {snapshot} (open it at https://pytorch.org/memory_viz{advice})")
        except OSError as failure:
            lines.append(f"no report: {failure}")
        return lines


def options_to_change(config: Config, phase: str = "step") -> list[str]:
    """What lowers the peak of this config in a phase (see `MemoryWatch.guard`), what changes no result first."""
    training, retention, selective = config.training, config.retention, config.retention.policy == "selective"
    options = []
    if training.micro_batch_size > 1 and phase != "placing":
        smaller = max(n for n in range(1, training.micro_batch_size) if training.global_batch_size % n == 0)
        options.append(f"training.micro_batch_size {smaller} instead of {training.micro_batch_size} (same result)")
    if phase == "step":
        if retention.policy == "all":
            options.append('retention.policy "checkpoint" (same result, a third more work)')
        if retention.retain_linears:
            options.append("retention.retain_linears false (same result, more work)")
        if selective and retention.placement == "device":
            options.append('retention.placement "host" (same result; slower where copies take longer than computing)')
        if selective:
            formats = [name for name in KV_FORMATS if name != "recompute"]
            coarser = formats[formats.index(retention.kv_format) + 1 :] if retention.kv_format in formats else []
            options += [f'retention.kv_format "{kv_format}"' for kv_format in coarser]
        if not selective:
            options.append('selection.strategy "supervised" with retention.policy "selective"')
    options += _sharding_options(config)
    if config.optimizer.precision != "pure_bf16":
        options.append('optimizer.precision "pure_bf16"')
    if config.model.adapter is None and phase == "step":
        options.append("model.adapter, which trains small matrices beside frozen weights")
    if phase == "placing":
        return [*options, "a smaller model, or another process on this device that can end"]
    options.append(f"data.sequence_length below {config.data.sequence_length}")
    options.append("if far more is reserved than allocated: PYTORCH_ALLOC_CONF=expandable_segments:True")
    return options


def _sharding_options(config: Config) -> list[str]:
    sharding = config.sharding
    if sharding.engine == "single":
        return ['sharding.engine "fsdp" or "deepspeed" over several devices (same result)']
    options = []
    if sharding.engine == "deepspeed" and config.zero_stage < 3:
        options.append(f"sharding.zero_stage 3 instead of {config.zero_stage} (same result)")
    if not sharding.reshard_after_forward:
        options.append("sharding.reshard_after_forward true (same result, more traffic)")
    if sharding.replicas > 1:
        options.append(f"sharding.replicas 1 instead of {sharding.replicas} (same result, more traffic)")
    if not sharding.offload_optimizer:
        both = (
            "sharding.offload_optimizer and offload_parameters"
            if config.shards_weights
            else "sharding.offload_optimizer"
        )
        options.append(f"{both} true (same result, slower)")
    return options


def largest_tensors(device: torch.device) -> str:
    """A table of the live tensors of a device that Python knows, the largest first, alike ones together."""
    alike: Counter[tuple[int, str]] = Counter()
    storages = set()
    for candidate in gc.get_objects():
        # Without `isinstance`, which asks lazy objects of libraries for their class.
        if not issubclass(type(candidate), Tensor) or candidate.device.type != device.type:
            continue
        # What wraps tensors, such as FSDP2's, has no storage of its own; those inside are found, too. What the compiler
        # has of tensors has none at all.
        if is_traceable_wrapper_subclass(candidate) or isinstance(candidate, FakeTensor):
            continue
        storage = candidate.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            alike[storage.nbytes(), f"{candidate.dtype} {[*candidate.shape]}"] += 1
    ordered = sorted(alike.items(), key=lambda item: -item[0][0] * item[1])
    lines = [f"{count:6} x {format_bytes(size):>12}  {kind}" for (size, kind), count in ordered[:LISTED_TENSORS]]
    return "\n".join(["live tensors, by what they take together:", *lines])
