"""What a step of a small model allocates, in order: one recorded step, taken apart at the borders of its blocks."""

from __future__ import annotations

import gc
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from framework.config import Config
from framework.data import Batch
from framework.models.wrapping import unwrapped
from framework.planner.engine_marks import marks_of
from framework.planner.law import BLOCKS, ENDS, PARTS, PLACES, STEP, places_of
from framework.planner.marks import END_OF_PASS, Mark
from framework.planner.naming import Naming
from framework.planner.symbols import model_symbols
from framework.retention import blocks_of
from framework.sharding.ranks import Ranks
from framework.training.memory import CpuMemoryTracker
from framework.training.optimizer import optimizer_factory
from framework.training.prepared import PreparedModel
from framework.training.step import train_window

_MIDDLE = {f"{way} {PLACES[ENDS]}" for way in ("forward", "backward")}
_NO_BLOCK = {"inputs", "loss", STEP}

WARM_UP = {3: 2}
"""Steps before the recorded one by ZeRO stage, one with others: the optimiser has its state then, and in stage 3
DeepSpeed knows the order of modules."""


class Change(NamedTuple):
    """An allocation, or what is freed.

    Attributes:
        bytes: negative for what is freed.
        repeated: a part that is no block's frees what the middle block has made: so it does with every block like it.
    """

    bytes: int
    repeated: bool


@dataclass
class RecordedPart:
    """A part of a step.

    Attributes:
        name: of `PARTS`, or the optimiser's step.
        changes: bytes of each allocation, in order; negative for what is freed.
        stretches: those that are not the engine's, between marks.
        marks: between the stretches.
        engine: of each mark, what the engine allocated and freed from it up to the next one.
    """

    name: str
    changes: list[int] = field(default_factory=list)
    stretches: list[list[Change]] = field(default_factory=lambda: [[]])
    marks: list[Mark] = field(default_factory=list)
    engine: list[list[int]] = field(default_factory=lambda: [[]])


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


# torch's dispatch modes are not annotated.
class Recorder(CpuMemoryTracker):  # type: ignore[no-untyped-call]
    """A tracker that writes down what it sees, what an engine does by itself apart."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        super().__init__()
        self.parts: list[RecordedPart] = []
        self._at_work = 0
        self._engines: set[int] = set()
        self._births: dict[int, int] = {}
        # Keys of what the middle block has made.
        self._of_middle: set[int] = set()
        self._counter = count()
        # Births of what was freed since the last allocation: libraries free what is in tables in no order of theirs.
        self._freed: list[int] = []

    def begin(self, name: str) -> None:
        """From here on it is another part."""
        self.parts.append(RecordedPart(name))
        self._freed.clear()

    def mark(self, mark: Mark, given: Tensor | None = None) -> None:
        """From here on it is another stretch.

        Args:
            mark: between the two.
            given: a tensor that is the engine's from here on.
        """
        if not self.parts:
            return
        self._freed.clear()
        part = self.parts[-1]
        part.marks.append(mark)
        part.engine.append([])
        key = None if given is None else given.untyped_storage()._cdata
        if key is not None and key in self._live and key not in self._engines:
            self._engines.add(key)
            size = self._live[key][1]
            part.stretches[-1].append(Change(-size, False))
            part.engine[-1].append(size)
        part.stretches.append([])

    def own(self) -> None:
        """What is live now is the engine's, with all that becomes of it."""
        self._engines.update(self._live)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What is made within this context is the engine's."""
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    def _count(self, storage: torch.UntypedStorage) -> None:
        if self._at_work and storage._cdata not in self._live:
            self._engines.add(storage._cdata)
        super()._count(storage)

    def _take_over(self, old: int) -> bool:
        storage = self._sum[0]() if self._sum is not None else None
        if storage is None or not super()._take_over(old):
            return False
        self._births[storage._cdata] = self._births.pop(old)
        for keys in (self._engines, self._of_middle):
            if old in keys:
                keys.discard(old)
                keys.add(storage._cdata)
        return True

    def _change(self, size: int, key: int) -> None:
        super()._change(size, key)
        engines, part = key in self._engines, self.parts[-1] if self.parts else None
        if key not in self._births:
            self._births[key] = next(self._counter)
            if part is not None and part.name in _MIDDLE:
                self._of_middle.add(key)
        birth = self._births[key]
        repeated = size < 0 and key in self._of_middle and part is not None and part.name in _NO_BLOCK
        if key not in self._live:
            self._engines.discard(key)
            self._of_middle.discard(key)
            del self._births[key]
        if part is not None and size:
            part.changes.append(size)
            if engines:
                part.engine[-1].append(size)
            else:
                self._write(part.stretches[-1], Change(size, repeated), birth)

    def _write(self, stretch: list[Change], change: Change, birth: int) -> None:
        """Append a change to a stretch; what is freed at once is in the order in which it was made."""
        place = len(stretch)
        if change.bytes > 0:
            self._freed.clear()
        else:
            earlier = bisect(self._freed, birth)
            place -= len(self._freed) - earlier
            self._freed.insert(earlier, birth)
        stretch.insert(place, change)


def record_step(config: Config, batch: Batch, ranks: Ranks, micro_batches: int = 2) -> Recording:
    """Make steps of a run in this process, of which the last is recorded.

    Args:
        config: of the run, of a model with `BLOCKS` blocks or more.
        batch: every micro-batch of each step.
        ranks: of the run; see `first_of`.
        micro_batches: of each step.
    """
    prepared = PreparedModel.build(config, None, ranks, None)
    symbols = model_symbols(prepared.model)
    naming = Naming.of(prepared.model)
    engine, objective = prepared.engine, prepared.objective
    recorder = Recorder()
    build = optimizer_factory(config, lambda line: None)

    def build_apart(model: nn.Module) -> torch.optim.Optimizer:
        """An optimiser whose updates are the engine's work."""
        optimizer = build(model)
        update = optimizer.step

        def step(*arguments: Any, **options: Any) -> Any:
            with recorder.at_work():
                return update(*arguments, **options)

        optimizer.step = step  # type: ignore[method-assign]  # of this one alone, which mypy cannot tell
        return optimizer

    engine.prepare(prepared.model, build_apart, prepared.initial)
    window = [batch] * micro_batches
    norm, rate = config.training.max_grad_norm, config.optimizer.learning_rate
    with _dropout_of_cuda():
        for _ in range(WARM_UP.get(config.zero_stage, 1)):
            train_window(engine, ranks, objective, window, rate, norm)
        for tensors in engine.held():
            recorder.track(tensors)
        recorder.track(gathered_before(engine.model))
        if config.sharding.engine == "deepspeed":
            recorder.own()
        start = recorder.current
        recorder.reset_peak()
        with _Borders(engine.model, recorder), marks_of(engine, recorder, naming), _collected(), recorder:
            recorder.begin(PARTS[0])
            train_window(_Announcing(engine, recorder, micro_batches), ranks, objective, window, rate, norm)
    # What is freed from here on is no part of the step.
    parts, recorder.parts = tuple(recorder.parts), []
    engine.close()
    return Recording(parts, start, recorder.peak, symbols)


@contextmanager
def _dropout_of_cuda() -> Iterator[None]:
    """Within this context dropout keeps a mask of bools, as on CUDA; the CPU keeps factors in the input's dtype."""

    def dropout(input: Tensor, p: float, train: bool) -> Tensor:
        return torch.native_dropout(input, p, train)[0] if train and p else input

    with mock.patch.object(torch._VF, "dropout", dropout, create=True):
        yield


@contextmanager
def _collected() -> Iterator[None]:
    """Within this context garbage in cycles stays: when Python looks for it is no matter of sizes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def gathered_before(model: nn.Module) -> Iterator[Tensor]:
    """What FSDP2 gathers weights into: made at the first step, empty between steps, grown again at the next."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            for parameter in group.fsdp_params if group is not None else ():
                yield from parameter.all_gather_outputs


class _Announcing:
    """An engine that says when a backward pass ends, and when its optimiser's step begins."""

    def __init__(self, engine: Any, recorder: Recorder, passes: int) -> None:
        self._engine, self._recorder, self._left = engine, recorder, passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def backward(self, loss: Tensor) -> None:
        """The engine's."""
        self._engine.backward(loss)
        self._recorder.mark(Mark(END_OF_PASS, "", None))
        self._left -= 1
        if self._left:
            self._recorder.begin(PARTS[0])

    def step(self, **arguments: Any) -> Any:
        """The engine's."""
        self._recorder.begin(STEP)
        return self._engine.step(**arguments)


class _Borders:
    """Within this context the recorder hears of the borders of a model's blocks."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._blocks = [*blocks_of(unwrapped(model)).values()]
        assert len(self._blocks) >= BLOCKS
        self._recorder = recorder
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for place, block in zip(places_of(len(self._blocks)), self._blocks, strict=True):
            self._handles.append(block.register_forward_pre_hook(self._entering(place)))
            self._handles.append(block.register_forward_hook(self._leaving(place)))

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, place: str) -> Any:
        def enter(*_: Any) -> None:
            # A block that is recomputed enters again, in the backward pass.
            if torch._C._current_graph_task_id() == -1:
                self._recorder.begin(f"forward {place}")

        return enter

    def _leaving(self, place: str) -> Any:
        def leave(block: nn.Module, inputs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            if place == "last":
                self._recorder.begin("loss")
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(  # type: ignore[no-untyped-call]  # torch's hooks are not annotated
                lambda gradient: self._recorder.begin(f"backward {place}")
            )

        return leave
