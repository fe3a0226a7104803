"""Saving by two processes that talk through torch.distributed, one of which is killed while it writes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from framework.checkpoint import find_checkpoint, remove_leftovers

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from framework.checkpoint import CheckpointSaver, saver
from framework.config import CheckpointConfig
from framework.sharding.fragments import Fragment
from framework.sharding.ranks import Place, joined_ranks

place, run_dir = Place.of_environment(), Path(sys.argv[1])
plain = saver.write_fragments

def dying(path, fragments):
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
"""


@pytest.mark.multiprocess
def test_killed_while_its_thread_writes_one_rank_ends_the_other_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**os.environ, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL], errors
    found = find_checkpoint(tmp_path)
    assert found is not None and (found.step, found.world_size) == (1, 2)
    assert found.load_state() == {"random": [0, 1]}
    assert torch.equal(found.weights().read("weight"), torch.tensor([10.0] * 4 + [11.0] * 4))
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
