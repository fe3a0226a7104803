"""What a step of a small model allocates, in order: one recorded step, taken apart at the borders of its blocks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from framework.config import Config
from framework.data import Batch
from framework.models.wrapping import unwrapped
from framework.planner.engine_marks import marks_of
from framework.planner.host_memory import HostRecorder, offloaded, offloading
from framework.planner.law import BLOCKS, PARTS, STEP, places_of
from framework.planner.marks import END_OF_PASS, Mark
from framework.planner.naming import Naming
from framework.planner.option_marks import options_of
from framework.planner.recorder import RecordedPart, Recorder
from framework.planner.symbols import model_symbols
from framework.retention import blocks_of
from framework.sharding.protocol import OptimizerFactory
from framework.sharding.ranks import Ranks
from framework.training import fused_loss
from framework.training.optimizer import optimizer_factory
from framework.training.prepared import PreparedModel
from framework.training.step import train_window

WARM_UP = {3: 2}
"""Steps before the recorded one by ZeRO stage, one with others: the optimiser has its state then, and in stage 3
DeepSpeed knows the order of modules. A micro-batch in each is enough for both."""


@dataclass(frozen=True)
class Recording:
    """A step, of two micro-batches unless it was asked for others.

    Attributes:
        parts: those of each micro-batch in turn, and the optimiser's step.
        start: bytes of weights, buffers and the optimiser's state, which are there before and after.
        peak: the most that was live, `start` included.
        symbols: sizes of the model.
        host: the most bytes that the engine and retention had on the host.
    """

    parts: tuple[RecordedPart, ...]
    start: int
    peak: int
    symbols: dict[str, float]
    host: int = 0


def record_step(config: Config, batch: Batch, ranks: Ranks, micro_batches: int = 2) -> Recording:
    """Make steps of a run in this process, of which the last is recorded.

    Args:
        config: of the run, of a model with `BLOCKS` blocks or more.
        batch: every micro-batch of each step.
        ranks: of the run; see `first_of`.
        micro_batches: of each step.
    """
    if not config.sharding.offloads:
        return _recorded(config, batch, ranks, micro_batches, Recorder())
    recorder = HostRecorder()
    with offloading(config, recorder):
        return _recorded(config, batch, ranks, micro_batches, recorder)


def _recorded(config: Config, batch: Batch, ranks: Ranks, micro_batches: int, recorder: Recorder) -> Recording:
    prepared = PreparedModel.build(config, None, ranks, None)
    symbols = model_symbols(prepared.model)
    naming = Naming.of(prepared.model)
    engine, objective = prepared.engine, prepared.objective
    engine.prepare(prepared.model, _apart(optimizer_factory(config, lambda line: None), recorder), prepared.initial)
    window = [batch] * micro_batches
    norm, rate = config.training.max_grad_norm, config.optimizer.learning_rate
    with _dropout_of_cuda():
        for _ in range(WARM_UP.get(config.zero_stage, 1)):
            train_window(engine, ranks, objective, window[:1], rate, norm)
        if isinstance(recorder, HostRecorder):
            recorder.on_host(offloaded(engine))
        for tensors in engine.held():
            recorder.track(tensors)
        recorder.track(gathered_before(engine.model))
        if config.sharding.engine == "deepspeed":
            recorder.own()
        start = recorder.current
        recorder.reset_peak()
        with (
            _Borders(engine.model, recorder),
            marks_of(engine, recorder, naming),
            options_of(engine.model, recorder),
            _chunks_of(recorder),
            _collected(),
            recorder,
        ):
            recorder.begin(PARTS[0])
            train_window(_Announcing(engine, recorder, micro_batches), ranks, objective, window, rate, norm)
    # What is freed from here on is no part of the step.
    parts, recorder.parts = tuple(recorder.parts), []
    engine.close()
    return Recording(parts, start, recorder.peak, symbols, recorder.host_peak)


def _apart(build: OptimizerFactory, recorder: Recorder) -> OptimizerFactory:
    """Builds an optimiser whose updates are the engine's work."""

    def built(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = build(model)
        update = optimizer.step

        def step(*arguments: Any, **options: Any) -> Any:
            with recorder.at_work():
                return update(*arguments, **options)

        optimizer.step = step  # type: ignore[method-assign]  # of this one alone, which mypy cannot tell
        return optimizer

    return built


@contextmanager
def _chunks_of(recorder: Recorder) -> Iterator[None]:
    """Within this context the recorder hears when the loss goes through its rows chunk by chunk."""
    plain = fused_loss.in_chunks

    def told(*arguments: Any) -> Tensor:
        with recorder.in_chunk():
            return plain(*arguments)

    with mock.patch.object(fused_loss, "in_chunks", told):
        yield


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
