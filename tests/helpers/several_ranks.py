"""Real processes that are the ranks of a launch, started in a fraction of a second.

A server that has imported the libraries forks them, with the environment that `torchrun` would give them. No launcher
watches over them: a rank whose neighbour dies has to notice it by itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "transformers", "peft", "framework.training.start", "framework.token_selection"]
TIMEOUT_SECONDS = 180
TRAIN = Path(__file__).parents[2] / "launchers" / "train.py"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Ended:
    """A rank that has ended: its exit code (negative: the signal that killed it), and what it printed."""

    code: int
    output: str


@dataclass
class Ranks:
    """Ranks that run."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> list[Ended]:
        """Let all end; those that have not after `timeout` seconds are killed, and the test fails."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        ended = [
            Ended(process.exitcode, path.read_text(errors="replace"))
            for process, path in zip(self.processes, self.outputs, strict=True)
        ]
        assert not late, f"ranks {late} hang:\n{ended[late[0]].output[-4000:]}"
        return ended

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        """End all at once."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def start(count: int, directory: Path, function: Callable[..., None], *arguments: Any) -> Ranks:
    """Start `function(*arguments)` on so many ranks; what they print goes to files in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, outputs = [], []
    for rank in range(count):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {name: str(value) for name, value in places.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        outputs.append(directory / f"output-{time.monotonic_ns()}-{rank}.txt")
        process = _context.Process(target=_run, args=(environment, outputs[-1], function, arguments))
        process.start()
        processes.append(process)
    return Ranks(processes, outputs)


def run(count: int, directory: Path, function: Callable[..., None], *arguments: Any) -> list[str]:
    """Call `function(*arguments)` on so many ranks; what each printed.

    Raises:
        AssertionError: one failed, or hangs.
    """
    ended = start(count, directory, function, *arguments).wait()
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} ended with {end.code}:\n{end.output[-6000:]}"
    return [end.output for end in ended]


def start_training(count: int, directory: Path, options: Sequence[str], patch: str = "") -> Ranks:
    """Start `launchers/train.py` on so many ranks, each with the code `patch` executed before."""
    return start(count, directory, train, [*options], patch)


def patched(target: str, call: int, ranks: Sequence[int], action: str) -> str:
    """Code that makes some ranks do something just before a function is called for the so manieth time.

    Args:
        target: `package.module:Class.function`.
        call: counted from 1, on each rank.
        ranks: that do it.
        action: a statement; `os`, `signal`, `time` and `rank` are there.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    return f"""
import functools, importlib
owner = functools.reduce(getattr, {owners}, importlib.import_module("{module}"))
plain, calls = getattr(owner, "{name}"), []
def patched(*args, **kwargs):
    calls.append(1)
    if rank in {[*ranks]} and len(calls) == {call}:
        {action}
    return plain(*args, **kwargs)
setattr(owner, "{name}", patched)
"""


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def train(options: list[str], patch: str = "") -> None:
    """`launchers/train.py` in this process."""
    exec(patch, {"os": os, "signal": signal, "time": time, "rank": int(os.environ["RANK"])})
    sys.argv = [str(TRAIN), *options]
    runpy.run_path(str(TRAIN), run_name="__main__")


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


def _run(environment: dict[str, str], output: Path, function: Callable[..., None], arguments: tuple) -> None:
    """In the new process: its place, its output, then the function."""
    os.environ.update(environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
