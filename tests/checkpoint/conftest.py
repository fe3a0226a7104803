"""Checkpoints small enough to save by the dozen."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from framework.checkpoint import (
    Checkpoint,
    save_checkpoint,
)
from framework.checkpoint.tensor_files import write_tensors
from framework.sharding.fragments import Fragment
from framework.sharding.ranks import Place, Ranks


@pytest.fixture
def save() -> Callable[..., Path]:
    def save(
        run_dir: Path,
        step: int,
        *,
        keep_last: int = 2,
        value: int | None = None,
        size: int = 64,
        evaluation: dict[str, float | None] | None = None,
        **best: Any,
    ) -> Path:
        value = 1000 + step if value is None else value

        def write_shards(directory: Path) -> list[Path]:
            path = directory / "model.safetensors"
            write_tensors(path, {"value": torch.full((size,), float(value))})
            return [path]

        return save_checkpoint(
            run_dir,
            step,
            write_shards=write_shards,
            state={"value": value, "generator": torch.get_rng_state()},
            manifest={"tokens": value, "evaluation": evaluation},
            keep_last=keep_last,
            **best,
        )

    return save


@pytest.fixture
def content() -> Callable[..., tuple[int, int]]:
    def content(checkpoint: Checkpoint | None) -> tuple[int, int]:
        """Step and value of a checkpoint, after checking that all its parts are of one save."""
        assert checkpoint is not None
        value = checkpoint.load_state()["value"]
        assert checkpoint.manifest["tokens"] == value
        assert load_file(checkpoint.path / "model.safetensors")["value"].tolist() == [float(value)] * 64
        return checkpoint.step, value

    return content


@pytest.fixture
def names() -> Callable[[Path], list[str]]:
    def names(run_dir: Path) -> list[str]:
        return sorted(path.name for path in (run_dir / "checkpoints").iterdir())

    return names


@pytest.fixture
def steps(names: Callable[[Path], list[str]]) -> Callable[[Path], list[int]]:
    def steps(run_dir: Path) -> list[int]:
        return [int(name.removeprefix("step-")) for name in names(run_dir) if name.startswith("step-")]

    return steps


@pytest.fixture
def pointer() -> Callable[[Path, str], int]:
    def pointer(run_dir: Path, name: str) -> int:
        return int((run_dir / "checkpoints" / name).read_text().strip().removeprefix("step-"))

    return pointer


@pytest.fixture
def save_losses(save: Callable[..., Path]) -> Callable[..., None]:
    def save_losses(run_dir: Path, losses: list[float | None], **options: Any) -> None:
        """Steps 1, 2, … with these evaluation losses."""
        for step, loss in enumerate(losses, start=1):
            save(run_dir, step, keep_last=1, evaluation={"loss": loss}, **options)

    return save_losses


class Together(Ranks):
    """A rank of several in one process, each in a thread of its own."""

    def __init__(self, rank: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.place = Place(rank, barrier.parties, rank, barrier.parties)
        self._barrier, self._box = barrier, box

    def gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = pickle.dumps(value)
        self._barrier.wait()
        values = [pickle.loads(content) for content in self._box]
        self._barrier.wait()
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.gather(None)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        reduce = {dist.ReduceOp.SUM: sum, dist.ReduceOp.MAX: max}[operation]
        return [float(reduce(column)) for column in zip(*self.gather(list(values)), strict=True)]


@pytest.fixture
def together() -> Callable[..., list[Any]]:
    """Call a function with each of so many ranks at the same time; gives what they return or raise."""

    def together(world_size: int, body: Callable[[Ranks], Any]) -> list[Any]:
        barrier = threading.Barrier(world_size, timeout=30)
        box: list[Any] = [None] * world_size
        results: list[Any] = [None] * world_size

        def run(rank: int) -> None:
            try:
                results[rank] = body(Together(rank, barrier, box))
            except Exception as error:  # handed to the test
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return results

    return together


class Apart(Together):
    """A rank of several processes, which talk through pipes that end with them.

    Every exchange passes through the first rank. `deadly` is called before and after each with its number, from 1, and
    "before" or "after".
    """

    def __init__(
        self, rank: int, pipes: list[tuple[Connection, Connection]], deadly: Callable[[int, str], None]
    ) -> None:
        self.place = Place(rank, len(pipes) + 1, rank, len(pipes) + 1)
        self._others = [first for first, _ in pipes] if rank == 0 else [pipes[rank - 1][1]]
        for first, other in pipes:
            for end in {first, other} - set(self._others):
                end.close()
        self._deadly, self._count = deadly, 0

    def gather(self, value: Any) -> list[Any]:
        self._count += 1
        self._deadly(self._count, "before")
        if self.is_first:
            values = [value, *(pipe.recv() for pipe in self._others)]
            for pipe in self._others:
                pipe.send(values)
        else:
            self._others[0].send(value)
            values = self._others[0].recv()
        self._deadly(self._count, "after")
        return values


@pytest.fixture
def apart() -> Callable[..., list[int]]:
    """Call a function with each of two ranks in child processes; gives their exit codes, -9 for a killed one."""

    def apart(body: Callable[[Ranks], None], deadly: Callable[[int, int, str], None] = lambda *_: None) -> list[int]:
        pipes = [Pipe()]
        children = []
        for rank in range(2):
            with warnings.catch_warnings():
                # A child that only writes files is safe beside the threads of the test runner.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                signal.alarm(60)
                code = 1
                try:
                    body(Apart(rank, pipes, partial(deadly, rank)))
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        for pipe in pipes:
            for end in pipe:
                end.close()
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    return apart


def parts_of(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> list[Fragment]:
    """What a rank holds where every tensor is cut into ranges of about the same length."""
    fragments = []
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        bounds = [flat.numel() * part // world_size for part in range(world_size + 1)]
        values = flat[bounds[rank] : bounds[rank + 1]]
        fragments.append(Fragment(name, tuple(tensor.shape), bounds[rank], values))
    return fragments


@pytest.fixture
def parts() -> Callable[..., list[Fragment]]:
    """See `parts_of`."""
    return parts_of


@pytest.fixture
def die() -> Callable[[], None]:
    """End this process, a child, at once."""
    return lambda: os.kill(os.getpid(), signal.SIGKILL)
