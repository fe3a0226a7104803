"""Saving by two processes that talk through torch.distributed, one of which is killed while it writes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import several_ranks
import torch

from framework.checkpoint import CheckpointSaver, find_checkpoint, remove_leftovers, saver
from framework.config import CheckpointConfig
from framework.sharding.fragments import Fragment
from framework.sharding.ranks import Place, joined_ranks


def save_twice(run_dir: Path) -> None:
    """The second time, the second rank dies."""
    place = Place.of_environment()

    def dying(path: Path, fragments: Iterable[Fragment]) -> None:
        path.write_bytes(b"half of it")
        if place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with joined_ranks(place, timeout_seconds=60) as ranks:
        keeper = CheckpointSaver(run_dir, CheckpointConfig(asynchronous=True), ranks)
        for step in (1, 2):
            if step == 2:
                saver.write_fragments = dying
            half = Fragment("weight", (2, 4), 4 * place.rank, torch.full((4,), 10.0 * step + place.rank))
            keeper.save(step, weights=[half], optimizer=[], state={"random": ranks.gather(place.rank)}, manifest={})
            while keeper.poll() is None:
                pass


@pytest.mark.multiprocess
def test_killed_while_its_thread_writes_one_rank_ends_the_other_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    ended = several_ranks.start(2, tmp_path / "outputs", save_twice, tmp_path / "run").wait(timeout=120)
    assert [end.code for end in ended] == [1, -signal.SIGKILL], [end.output for end in ended]
    run_dir = tmp_path / "run"
    found = find_checkpoint(run_dir)
    assert found is not None and (found.step, found.world_size) == (1, 2)
    assert found.load_state() == {"random": [0, 1]}
    assert torch.equal(found.weights().read("weight"), torch.tensor([10.0] * 4 + [11.0] * 4))
    remove_leftovers(run_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step-00000001"]
