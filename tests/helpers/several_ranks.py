"""Forked processes that are the ranks of a launch, with the environment that `torchrun` would give them.

No launcher watches over them: a rank whose neighbour dies has to notice it by itself.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import TIMEOUT_SECONDS, TRAIN, Ended, Forked, fork, run_script

SCRIPT_TIMEOUT_SECONDS = 900


@dataclass
class Ranks:
    """Ranks that run."""

    processes: list[Forked]

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> list[Ended]:
        """Let all end; when one has not after `timeout` seconds all are killed, and the test fails."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for process in self.processes:
            process.signal(number)

    def kill(self) -> None:
        """End all at once."""
        for process in self.processes:
            process.kill()


def start(count: int, directory: Path, function: Callable[..., None], *arguments: Any) -> Ranks:
    """Start `function(*arguments)` on so many ranks; what they print goes to files in `directory`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {name: str(value) for name, value in places.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(fork(directory, function, *arguments, environment=environment))
    return Ranks(processes)


def run(
    count: int, directory: Path, function: Callable[..., None], *arguments: Any, timeout: float = TIMEOUT_SECONDS
) -> list[str]:
    """Call `function(*arguments)` on so many ranks; what each printed.

    Raises:
        AssertionError: one failed, or hangs.
    """
    ended = start(count, directory, function, *arguments).wait(timeout)
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} ended with {end.code}:\n{end.output[-6000:]}"
    return [end.output for end in ended]


def start_training(count: int, directory: Path, options: Sequence[str], patch: str = "") -> Ranks:
    """Start `launchers/train.py` on so many ranks, each with the code `patch` executed before."""
    return start(count, directory, run_script, TRAIN, [*options], patch)


def run_script_on_ranks(directory: Path) -> Callable[..., None]:
    """What tools start a script on ranks with, in the place of `torchrun`."""

    def launch(count: int, script: Path, *arguments: Path) -> None:
        run(count, directory, run_script, script, [*map(str, arguments)], timeout=SCRIPT_TIMEOUT_SECONDS)

    return launch


def train_one_after_the_other(config: str, shardings: list[dict[str, Any]], runs: str) -> None:
    """`framework.train` again and again in this process, which has no connections in between; writes what it leaves.

    Args:
        config: path of a config.
        shardings: its `sharding` section in each run.
        runs: directory for the runs, numbered, and for `left.json`: what is left after each.
    """
    import gc

    import torch
    from transformers import PreTrainedModel

    import framework

    linear, left = torch.nn.functional.linear, []
    for number, sharding in enumerate(shardings):
        overrides = [f"run.output_dir={runs}/{number}", f"sharding={json.dumps(sharding)}"]
        framework.train(framework.load_config(Path(config), overrides))
        gc.collect()
        models = sum(isinstance(found, PreTrainedModel) for found in gc.get_objects())
        left.append([models, torch.nn.functional.linear is linear, torch.distributed.is_initialized()])
    Path(runs, "left.json").write_text(json.dumps(left))
