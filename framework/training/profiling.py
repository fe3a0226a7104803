"""A profile of some steps: what ran when, and for how long, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from framework.config import ProfileConfig

TOP_OPERATORS = 15


class StepProfiler:
    """Profiles the steps that a config names, once a run.

    Writes `step-START.trace.json.gz`, a Chrome trace for https://ui.perfetto.dev, and `step-START.txt`, all operators
    by the time they took; the first of them are also reported. Ranges in the trace: data, forward, backward, optimizer
    step, and of selective blocks `record NAME`, `replay NAME` and `backward NAME`.

    Args:
        settings: the config's `logging.profile`.
        directory: where to write.
        device: that the run computes on.
        report: takes the table.
    """

    def __init__(
        self, settings: ProfileConfig, directory: Path, device: torch.device, report: Callable[[str], None]
    ) -> None:
        self._settings, self._directory, self._device, self._report = settings, directory, device, report
        self._profile: profile | None = None
        self._first: int | None = None

    def begin_step(self, step: int) -> None:
        """Call before step `step`; starts a step early, so that the profiler's own start is not in the profile."""
        start = self._settings.start
        if self._first is None:
            self._first = step
            if step > start:
                self._report(f"logging.profile: step {start} is past, so nothing is profiled")
        if step == max(self._first, start - 1) and step <= start:
            self._start(warmup=start - step)

    def end_step(self, step: int) -> None:
        """Call after step `step`."""
        if self._profile is None:
            return
        self._profile.step()
        if step == self._settings.start + self._settings.steps - 1:
            self.close()

    def close(self) -> None:
        """End a profile that is under way, and write what it has."""
        if self._profile is not None:
            running, self._profile = self._profile, None
            running.stop()

    def _start(self, warmup: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            # One step more than is wanted, so that it is `close` that ends the profile.
            schedule=schedule(wait=0, warmup=warmup, active=self._settings.steps + 1, repeat=1),
            on_trace_ready=self._write,
            record_shapes=self._settings.shapes,
            profile_memory=self._settings.memory,
        )
        self._profile.start()

    def _write(self, finished: profile) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        trace = self._directory / f"step-{self._settings.start:08}.trace.json.gz"
        finished.export_chrome_trace(str(trace))
        order = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        operators = finished.key_averages(group_by_input_shape=self._settings.shapes)
        table = partial(operators.table, sort_by=order, max_name_column_width=48)
        listing = trace.with_name(f"step-{self._settings.start:08}.txt")
        listing.write_text(table(row_limit=-1), encoding="utf-8")
        top = table(row_limit=TOP_OPERATORS)
        self._report(f"{top}\nprofile: {trace} (open it at https://ui.perfetto.dev), all operators: {listing}")
