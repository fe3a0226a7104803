"""The memory that a plan predicts beside what a run measures: the drift, and what to try when memory runs out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from framework.config import Config
from framework.hardware import known_device
from framework.planner.drift import Drift, record_drift
from framework.planner.hardware import CPU
from framework.planner.overrides import RESULT_KEYS
from framework.planner.plan import as_set
from framework.sharding.protocol import Held
from framework.training.progress import format_bytes

MEASURED_STEP = 2
"""Of a start: the first one finds no state of the optimiser."""

DRIFT_LIMIT = 0.03

LIBRARIES = ("torch", "transformers", "peft")
"""Whose versions are kept with a drift."""

_REQUEST = re.compile(r"Tried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class PeakCheck:
    """Compares the peak of a start's second step with the plan's, once.

    Args:
        plan: what `plan.json` holds.
        config: of the run.
        device: that it computes on.
        report: gets the line.
        after_step: the step that the run starts from.
    """

    def __init__(
        self,
        plan: Mapping[str, Any],
        config: Config,
        device: torch.device,
        report: Callable[[str], None],
        *,
        after_step: int,
    ) -> None:
        # On a CPU what is offloaded is where everything is.
        apart = device.type != "cpu" or not config.sharding.offloads
        self._predicted: int | None = plan["chosen"]["peak_allocated_bytes"] if apart else None
        self._config, self._device, self._report = config, device, report
        self._step = after_step + MEASURED_STEP

    def observe(self, step: int, measured: int | None) -> None:
        """Take the peak of a step, of the rank with most; None where nobody counts it."""
        if step != self._step or measured is None or self._predicted is None:
            return
        record = Drift(
            config=self._config.sha256(),
            predicted=self._predicted,
            measured=measured,
            versions={name: version(name) for name in LIBRARIES},
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        side = "below" if record.error < 0 else "above"
        line = (
            f"step {step} takes {format_bytes(measured)} at its peak; the plan's {format_bytes(self._predicted)} is "
            f"{abs(record.error):.2%} {side} that"
        )
        if abs(record.error) <= DRIFT_LIMIT:
            self._report(line)
            return
        record_drift(device_name(self._device), record)
        self._report(f"warning: {line}, over {DRIFT_LIMIT:.0%}; it is kept for calibration")


def device_name(device: torch.device) -> str:
    """The name under which the planner has figures of a device."""
    if device.type != "cuda":
        return CPU
    name = torch.cuda.get_device_name(device)
    known = known_device(name)
    return name if known is None else known.name


def requested_bytes(error: torch.OutOfMemoryError) -> int:
    """What could not be allocated, as the allocator's message says; 0 where it does not."""
    found = _REQUEST.search(str(error))
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0


def held_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the storages of tensors on a kind of device, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def advice(plan: Mapping[str, Any], held: Mapping[str, int] | None, reached: int | None, requested: int) -> list[str]:
    """What a plan has to say about an out-of-memory error, a line each; nothing if it predicts nothing.

    Args:
        plan: what `plan.json` holds.
        held: bytes by kind, from `held_by_kind`; None before there are any.
        reached: peak of the step so far, in bytes; None where nobody counts.
        requested: bytes that could not be allocated.
    """
    chosen = plan["chosen"]
    if chosen["peak_allocated_bytes"] is None:
        return []
    lines = [
        f"planned: {format_bytes(chosen['peak_allocated_bytes'])} at the peak ({chosen['binding_phase']}), of "
        f"{format_bytes(plan['budget_bytes'])} that a rank may take"
    ]
    if reached is not None:
        asked = f", and {format_bytes(requested)} more was asked for" if requested else ""
        lines.append(f"reached: {format_bytes(reached)}{asked}")
    if held is not None:
        parts = dict(held)
        if reached is not None:
            parts["activations and all else"] = max(0, reached - sum(held.values()))
        lines.append("held: " + ", ".join(f"{kind} {format_bytes(size)}" for kind, size in parts.items()))
    needed = None if reached is None else reached + requested
    return [*lines, _next_words(plan, needed)]


def held_by_kind(held: Held, device: torch.device) -> dict[str, int]:
    """Bytes of what a rank holds on its device, by kind."""
    named = {"weights": held.weights, "gradients": held.gradients, "optimizer state": held.optimizer}
    return {kind: held_bytes(tensors, device) for kind, tensors in named.items()}


def next_plan(plan: Mapping[str, Any], needed: int | None) -> tuple[Mapping[str, Any] | None, bool]:
    """The fallback to try after memory ran out, and whether it should do; None if there is none.

    One is taken to exceed its prediction by as many bytes as the chosen plan did, and should stay within the budget,
    and within what the run got. If none does, it is the smallest.

    Args:
        plan: what `plan.json` holds.
        needed: bytes that the step needed at the least; None where nobody counted: the next smaller plan, then.
    """
    fallbacks, chosen = plan["fallbacks"], plan["chosen"]
    if not fallbacks:
        return None, False
    if needed is None:
        return fallbacks[0], True
    peak, reserved = chosen["peak_allocated_bytes"], chosen["peak_reserved_bytes"]
    budget = plan["budget_bytes"] * peak / reserved
    limit = min(budget, needed) - max(0, needed - peak)
    found = next((fallback for fallback in fallbacks if fallback["peak_allocated_bytes"] < limit), None)
    return (fallbacks[-1], False) if found is None else (found, True)


def _next_words(plan: Mapping[str, Any], needed: int | None) -> str:
    fallback, should_do = next_plan(plan, needed)
    if fallback is None:
        return "next plan: none, for nothing that the config permits takes less"
    options = [f"{key}={as_set(value)}" for key, value in fallback["overrides"].items()]
    line = shlex.join(word for option in options for word in ("--set", option))
    now, then = plan["overrides"], fallback["overrides"]
    same = all(now.get(key) == then.get(key) for key in RESULT_KEYS)
    result = "same result" if same else f"another result: {fallback['fidelity_class']}"
    doubt = "" if should_do else ", the least that the config permits, which may be too much"
    return (
        f"next plan: {line} ({result}), {format_bytes(fallback['peak_allocated_bytes'])} at the peak instead of "
        f"{format_bytes(plan['chosen']['peak_allocated_bytes'])}{doubt}"
    )
