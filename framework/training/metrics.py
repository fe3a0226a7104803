"""`metrics.jsonl`: what was measured at each step, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class TrainRecord:
    """One optimiser step.

    Attributes:
        step: number of the step, from 1.
        loss: mean over the window's supervised tokens (as weighted by the selection), nats.
        learning_rate: of this step.
        grad_norm: global norm before clipping.
        tokens: non-padding tokens of the window, all ranks.
        supervised_tokens: tokens of them that carry a label.
        selected_tokens: tokens of them that received gradient; all of them in exact training.
        step_seconds: wall time of the step with its data, without evaluation and saving.
        tokens_per_second: `tokens / step_seconds`.
        peak_memory_bytes: of the rank with most; CUDA: peak bytes of live tensors; CPU: the same by the tracker if it
            is on, else None.
        peak_reserved_bytes: of the rank with most; CUDA: peak bytes held by the allocator; None elsewhere, and then not
            written.
        predicted_peak_memory_bytes: by the plan, None where there is none.
        model_flops: floating-point operations that the chosen gradient needs, all ranks; see `training.flops`.
        hardware_flops: those that ran, padding and recomputation included.
        mfu: model FLOP utilisation, `model_flops` over what the devices could do in `step_seconds`; None where their
            peak is not known.
        hfu: hardware FLOP utilisation, the same of `hardware_flops`.
        loss_scale: that the losses of this step were multiplied with; fp16 only, and written only then.
        skipped: the update was left out because of a non-finite loss or gradient; written only then.
        skipped_steps: steps of the run that were skipped so far; written if there were any.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    selected_tokens: int
    step_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None
    predicted_peak_memory_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    model_flops: int | None = None
    hardware_flops: int | None = None
    mfu: float | None = None
    hfu: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    skipped_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """The line's object."""
        record = {"kind": "train"} | asdict(self)
        absent = [name for name in ("peak_reserved_bytes", "loss_scale") if record[name] is None]
        absent += [name for name in ("skipped", "skipped_steps") if not record[name]]
        return {name: value for name, value in record.items() if name not in absent}


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation.

    Attributes:
        step: optimiser steps done.
        loss: mean over the labels, nats.
        tokens: the labels: supervised tokens, or samples with a class.
        accuracy: share of the samples whose class was found; None but for classifiers, and then not written.
    """

    step: int
    loss: float
    tokens: int
    accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The line's object."""
        record = {"kind": "eval"} | asdict(self)
        if self.accuracy is None:
            del record["accuracy"]
        return record

    def figures(self) -> dict[str, float | None]:
        """What was found, by name, for a checkpoint's manifest: JSON values, as in the line."""
        return json_values({name: value for name, value in self.to_json().items() if name not in ("kind", "step")})


class MetricsFile:
    """Appends records to `metrics.jsonl`; every line is with the operating system before the next step starts.

    Without a path, on ranks that do not write, records go nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a", encoding="utf-8")

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Append one line."""
        if self._file is not None:
            self._file.write(json.dumps(json_values(record.to_json()), allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Put everything written so far on disk, which a checkpoint relies on."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def json_values(record: dict[str, Any]) -> dict[str, Any]:
    """The same with null for the numbers that JSON has no name for (NaN, infinity)."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
