"""Saving while training goes on: the same files, complete at the same step boundary for every rank, or a leftover."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.checkpoint import CheckpointSaver, find_checkpoint, remove_leftovers, saver
from framework.checkpoint.saver import HostCopies
from framework.config import CheckpointConfig
from framework.errors import RunError
from framework.sharding.fragments import Fragment, whole
from framework.sharding.ranks import Ranks

Parts = Callable[..., list[Fragment]]


class Trained:
    """Weights and moments that a step changes in place."""

    def __init__(self, parts: Parts, ranks: Ranks) -> None:
        self.parts, self.ranks = parts, ranks
        self.weights = {"weight": torch.zeros(5, 3), "bias": torch.zeros(3, dtype=torch.bfloat16)}
        self.moments = {"exp_avg.weight": torch.ones(5, 3), "step.weight": torch.tensor(0.0)}

    def step(self) -> None:
        for tensor in (*self.weights.values(), *self.moments.values()):
            tensor += 1

    def save(self, saver: CheckpointSaver, step: int, **manifest: Any) -> Path | None:
        place = self.ranks.rank, self.ranks.world_size
        position = {"index": step}
        try:
            return saver.save(
                step,
                weights=self.parts(self.weights, *place),
                optimizer=self.parts(self.moments, *place),
                state={"loader": position},
                manifest=manifest | {"loader": position},
            )
        finally:
            position["index"] = -1


def settings(asynchronous: bool, **options: Any) -> CheckpointConfig:
    return CheckpointConfig(asynchronous=asynchronous, **options)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits until this is set."""
    event = threading.Event()
    plain = saver.write_fragments

    def write(path: Path, fragments: Any) -> None:
        assert event.wait(30)
        plain(path, fragments)

    monkeypatch.setattr(saver, "write_fragments", write)
    yield event
    event.set()


def run_steps(run_dir: Path, parts: Parts, *, asynchronous: bool) -> Callable[[Ranks], list[Path | None]]:
    """Save steps 2 and 4 of five, with whatever `save`, `poll` and `wait` return."""

    def run(ranks: Ranks) -> list[Path | None]:
        trained, returned = Trained(parts, ranks), []
        keeper = CheckpointSaver(run_dir, settings(asynchronous, keep_last=9), ranks)
        for step in range(1, 6):
            trained.step()
            returned.append(keeper.poll())
            if step in (2, 4):
                returned.append(trained.save(keeper, step, evaluation={"loss": 1.0 / step}))
        returned.append(keeper.wait())
        return returned

    return run


@pytest.mark.parametrize("world_size", [1, 2])
def test_files_are_the_same_to_the_bit_in_either_mode(
    tmp_path: Path, together: Any, parts: Parts, world_size: int
) -> None:
    for mode in ("synchronous", "asynchronous"):
        for returned in together(world_size, run_steps(tmp_path / mode, parts, asynchronous=mode == "asynchronous")):
            paths = [path.name for path in returned if path is not None]
            # A pending save of step 2 is completed by the save of step 4, if no poll did so before.
            assert paths[-1] == "step-00000004" and set(paths) <= {"step-00000002", "step-00000004"}
    files = [
        {
            path.relative_to(tmp_path / mode): path.read_bytes()
            for path in (tmp_path / mode).rglob("*")
            if path.is_file()
        }
        for mode in ("synchronous", "asynchronous")
    ]
    assert files[0] == files[1]
    # latest; two steps of a state, a manifest, and two files of every rank.
    assert len(files[0]) == 1 + 2 * (2 + 2 * world_size)


def test_what_is_saved_is_of_the_step_it_was_saved_at(
    tmp_path: Path, together: Any, parts: Parts, gate: threading.Event
) -> None:
    def run(ranks: Ranks) -> list[Path | None]:
        trained = Trained(parts, ranks)
        keeper = CheckpointSaver(tmp_path, settings(True), ranks)
        trained.step()
        returned = [trained.save(keeper, 1)]
        for _ in range(3):
            trained.step()
            returned.append(keeper.poll())
        ranks.barrier()
        gate.set()
        return [*returned, keeper.wait(), keeper.wait(), keeper.poll()]

    path = tmp_path / "checkpoints" / "step-00000001"
    assert together(2, run) == [[None] * 4 + [path, None, None]] * 2
    found = find_checkpoint(tmp_path)
    assert found is not None and found.manifest["loader"] == {"index": 1} == found.load_state()["loader"]
    assert found.weights().read("weight").tolist() == [1.0] * 15
    assert found.weights().read("bias").tolist() == [1.0] * 3
    assert found.optimizer().read("exp_avg.weight").tolist() == [2.0] * 15
    assert found.optimizer().read("step.weight").tolist() == [1.0]


def test_it_is_complete_for_all_ranks_at_the_first_boundary_where_all_have_written(
    tmp_path: Path, together: Any, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = threading.Event()
    plain = saver.write_fragments

    def write(path: Path, fragments: Any) -> None:
        assert "-00001-of" not in path.name or slow.wait(30)
        plain(path, fragments)

    monkeypatch.setattr(saver, "write_fragments", write)

    def run(ranks: Ranks) -> list[bool]:
        trained = Trained(parts, ranks)
        keeper = CheckpointSaver(tmp_path, settings(True), ranks)
        trained.save(keeper, 1)
        complete = []
        for step in range(6):
            if step == 3:
                slow.set()
                while any(thread.name == "save step 1" for thread in threading.enumerate()):
                    time.sleep(0.01)
                ranks.barrier()
            complete.append(keeper.poll() is not None)
        return complete

    assert together(2, run) == [[False, False, False, True, False, False]] * 2


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, parts: Parts, steps: Any) -> None:
    trained = Trained(parts, Ranks())
    keeper = CheckpointSaver(tmp_path, settings(True, keep_last=9), Ranks())
    for step in range(1, 6):
        trained.step()
        trained.save(keeper, step)
        assert steps(tmp_path) == list(range(1, step))
    keeper.wait()
    for step in range(1, 6):
        found = find_checkpoint(tmp_path, str(tmp_path / "checkpoints" / f"step-{step:08d}"))
        assert found is not None and found.weights().read("weight").tolist() == [float(step)] * 15


def test_an_error_of_a_thread_is_raised_at_the_next_boundary_on_all_ranks(
    tmp_path: Path, together: Any, parts: Parts, names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = saver.write_fragments

    def write(path: Path, fragments: Any) -> None:
        if path.name == "optimizer-00001-of-00002.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(path, fragments)

    monkeypatch.setattr(saver, "write_fragments", write)

    def run(ranks: Ranks) -> None:
        keeper = CheckpointSaver(tmp_path, settings(True), ranks)
        assert Trained(parts, ranks).save(keeper, 7) is None
        while keeper.poll() is None:
            pass

    message = f"rank 1: cannot save step 7 to {tmp_path / 'checkpoints'}: [Errno 5] Input/output error"
    assert [(type(error), str(error)) for error in together(2, run)] == [(RunError, message)] * 2
    assert names(tmp_path) == []


def test_a_host_without_memory_for_the_copies_is_said_by_all_ranks(
    tmp_path: Path, together: Any, parts: Parts, names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(ranks: Ranks) -> None:
        keeper = CheckpointSaver(tmp_path, settings(True), ranks)
        if ranks.rank == 1:

            def fail(held: Any) -> None:
                raise RuntimeError("can't allocate")

            keeper._copies.of = fail
        assert Trained(parts, ranks).save(keeper, 7) is None
        while keeper.poll() is None:
            pass

    message = "rank 1: checkpoint.asynchronous: the host cannot hold a copy of what this rank saves: can't allocate"
    assert [(type(error), str(error)) for error in together(2, run)] == [(RunError, message)] * 2
    assert names(tmp_path) == []


def test_given_up_it_is_a_leftover(tmp_path: Path, parts: Parts, names: Any) -> None:
    keeper = CheckpointSaver(tmp_path, settings(True), Ranks())
    Trained(parts, Ranks()).save(keeper, 3)
    keeper.close()
    assert names(tmp_path) == [".step-00000003.tmp"]
    assert keeper.poll() is None and find_checkpoint(tmp_path) is None
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_giving_up_does_not_wait_for_a_slow_disk(
    tmp_path: Path, parts: Parts, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "GIVING_UP_SECONDS", 0.01)
    keeper = CheckpointSaver(tmp_path, settings(True), Ranks())
    Trained(parts, Ranks()).save(keeper, 3)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "save step 3"]
    keeper.close()
    assert thread.is_alive()
    gate.set()
    thread.join(30)
    # The file that was being written, and no other.
    assert [path.name for path in (tmp_path / "checkpoints" / ".step-00000003.tmp").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_while_its_thread_writes_it_is_a_leftover(
    tmp_path: Path,
    together: Any,
    apart: Callable[..., list[int]],
    parts: Parts,
    die: Callable[[], None],
    names: Any,
    victim: int,
) -> None:
    together(2, run_steps(tmp_path, parts, asynchronous=True))

    def run(ranks: Ranks) -> None:
        def write(path: Path, fragments: Any) -> None:
            path.write_bytes(b"half of it")
            if ranks.rank == victim:
                die()

        saver.write_fragments = write
        keeper = CheckpointSaver(tmp_path, settings(True), ranks)
        Trained(parts, ranks).save(keeper, 9)
        while keeper.poll() is None:
            time.sleep(0.01)

    codes = apart(run)
    assert codes[victim] == -9 and codes[1 - victim] == 1
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 4
    assert found.weights().read("weight").tolist() == [4.0] * 15
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000004"]


def test_copies_use_their_buffers_again_and_are_apart_from_what_they_copy() -> None:
    copies = HostCopies()
    values = torch.arange(6.0)
    first = copies.of({"model": [whole("a", values)], "optimizer": [whole("a", values * 2)]})
    values += 1
    assert first["model"][0].values.tolist() == [0, 1, 2, 3, 4, 5]
    assert first["optimizer"][0].values.tolist() == [0, 2, 4, 6, 8, 10]
    second = copies.of({"model": [whole("a", values)], "optimizer": []})
    assert second["model"][0].values.data_ptr() == first["model"][0].values.data_ptr()
    assert second["model"][0].values.tolist() == [1, 2, 3, 4, 5, 6]
    # Another share of the tensor, or another dtype, needs another buffer.
    half = copies.of({"model": [whole("a", values.bfloat16())]})["model"][0].values
    assert half.dtype == torch.bfloat16 and half.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned copies need a CUDA device")
def test_copies_from_a_device_are_pinned_and_in_the_order_of_its_stream() -> None:
    copies = HostCopies()
    values = torch.zeros(2**24, device="cuda")
    for step in range(1, 4):
        values += 1
        copied = copies.of({"model": [whole("a", values)]})["model"][0].values
        values += 1  # the next step, which must not be seen
        copies.wait()
        assert copied.is_pinned() and copied.eq(2 * step - 1).all()
