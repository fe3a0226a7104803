"""What a step of a small model allocates, in order: one recorded step, taken apart at the borders of its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from framework.config import Config
from framework.data import Batch
from framework.models.wrapping import unwrapped
from framework.planner.law import BLOCKS, ENDS, PARTS, PLACES, STEP
from framework.planner.symbols import model_symbols
from framework.retention import blocks_of
from framework.sharding.ranks import Ranks
from framework.training.memory import CpuMemoryTracker
from framework.training.optimizer import optimizer_factory
from framework.training.prepared import PreparedModel
from framework.training.step import train_window


@dataclass
class RecordedPart:
    """A part of a step.

    Attributes:
        name: of `PARTS`, or the optimiser's step.
        changes: bytes of each allocation, in order; negative for what is freed.
    """

    name: str
    changes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Recording:
    """A step, of two micro-batches unless it was asked for others.

    Attributes:
        parts: those of each micro-batch in turn, and the optimiser's step.
        start: bytes of weights, buffers and the optimiser's state, which are there before and after.
        peak: the most that was live, `start` included.
        symbols: sizes of the model.
    """

    parts: tuple[RecordedPart, ...]
    start: int
    peak: int
    symbols: dict[str, float]


# torch's dispatch modes and hooks are not annotated.
class _Recorder(CpuMemoryTracker):  # type: ignore[no-untyped-call]
    """A tracker that writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[RecordedPart] = []

    def begin(self, name: str) -> None:
        """From here on it is another part."""
        self.parts.append(RecordedPart(name))

    def _change(self, size: int) -> None:
        super()._change(size)
        if self.parts:
            self.parts[-1].changes.append(size)


def record_step(config: Config, batch: Batch, ranks: Ranks, micro_batches: int = 2) -> Recording:
    """Make two steps of a run in this process, of which the second is recorded: the optimiser has its state then.

    Args:
        config: of the run, of a model with `BLOCKS` blocks or more.
        batch: every micro-batch of each step.
        ranks: of the run; see `first_of`.
        micro_batches: of each step.
    """
    first = second = [batch] * micro_batches
    prepared = PreparedModel.build(config, None, ranks, None)
    symbols = model_symbols(prepared.model)
    engine, objective = prepared.engine, prepared.objective
    engine.prepare(prepared.model, optimizer_factory(config, lambda line: None), prepared.initial)
    norm = config.training.max_grad_norm
    train_window(engine, ranks, objective, first, config.optimizer.learning_rate, norm)
    recorder = _Recorder()
    for tensors in engine.held():
        recorder.track(tensors)
    start = recorder.current
    recorder.reset_peak()
    with _Borders(engine.model, recorder), recorder:
        recorder.begin(PARTS[0])
        train_window(_Announcing(engine, recorder), ranks, objective, second, config.optimizer.learning_rate, norm)
    found = Recording(tuple(recorder.parts), start, recorder.peak, symbols)
    engine.close()
    return found


class _Announcing:
    """An engine that says when its optimiser's step begins."""

    def __init__(self, engine: Any, recorder: _Recorder) -> None:
        self._engine, self._recorder = engine, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, **arguments: Any) -> Any:
        """The engine's."""
        self._recorder.begin(STEP)
        return self._engine.step(**arguments)


class _Borders:
    """Within this context the recorder hears of the borders of a model's blocks."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        self._blocks = [*blocks_of(unwrapped(model)).values()]
        assert len(self._blocks) >= BLOCKS
        self._recorder = recorder
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        ends, middle = PLACES[:ENDS], PLACES[ENDS]
        places = [*ends, *[middle] * (len(self._blocks) - 2 * ENDS), *PLACES[ENDS + 1 :]]
        for place, block in zip(places, self._blocks, strict=True):
            self._handles.append(block.register_forward_pre_hook(self._entering(place)))
            self._handles.append(block.register_forward_hook(self._leaving(place)))

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, place: str) -> Any:
        def enter(*_: Any) -> None:
            # A block that is recomputed enters again, in the backward pass.
            if torch._C._current_graph_task_id() == -1:
                if place == "first" and self._recorder.parts[-1].name != PARTS[0]:
                    self._recorder.begin(PARTS[0])
                self._recorder.begin(f"forward {place}")

        return enter

    def _leaving(self, place: str) -> Any:
        def leave(block: nn.Module, inputs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            if place == "last":
                self._recorder.begin("loss")
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(  # type: ignore[no-untyped-call]  # as above
                lambda gradient: self._recorder.begin(f"backward {place}")
            )

        return leave
