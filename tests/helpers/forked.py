"""Real processes, started in a fraction of a second: a server that has imported the libraries forks them.

What a process of its own says, its exit code, signals and files are those of one that was started from the shell. What
its interpreter does before the first line and after the last is not: tests of that start a command.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
TRAIN = ROOT / "launchers" / "train.py"
TIMEOUT_SECONDS = 180
# What runs import on their way, with no look for garbage.
PRELOADED = ["no_garbage", "framework.training.start", "framework.token_selection", "framework.sharding.fsdp"]
PRELOADED += ["datasets", "torch._dynamo", "transformers.models.llama.modeling_llama"]
# It looks at its device when it is imported, and a process with CUDA at work cannot be forked.
DEEPSPEED = {"DS_ACCELERATOR": "cpu"} if not torch.cuda.is_available() else {}
if DEEPSPEED:
    PRELOADED.append("deepspeed")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code (negative: the signal that killed it), and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both streams, one after the other."""
        return self.stdout + self.stderr


class Forked:
    """A process that runs."""

    def __init__(self, process: BaseProcess, stdout: Path, stderr: Path) -> None:
        self.process, self.stdout, self.stderr = process, stdout, stderr

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> Ended:
        """Let it end; if it has not after `timeout` seconds it is killed, and the test fails."""
        self.process.join(timeout)
        late = self.is_running
        self.kill()
        ended = Ended(self.process.exitcode, *(file.read_text(errors="replace") for file in (self.stdout, self.stderr)))
        assert not late, f"it hangs:\n{ended.output[-4000:]}"
        return ended

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        if self.is_running:
            self.process.kill()
        self.process.join()


def fork(
    directory: Path, function: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Forked:
    """Start `function(*arguments)`, with changes to the environment; what it prints goes to files in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic_ns()
    streams = [directory / f"{started}-{stream}.txt" for stream in ("stdout", "stderr")]
    for stream in streams:
        stream.touch()
    process = _context.Process(target=_run, args=(dict(environment or {}), streams, function, arguments))
    with pytest.MonkeyPatch.context() as patch:
        # The server is started with the first process, and looks for modules here only.
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HELPERS}", prepend=os.pathsep)
        for name, value in ({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | DEEPSPEED).items():
            patch.setenv(name, value)
        process.start()
    return Forked(process, *streams)


def fork_script(directory: Path, script: Path, options: Sequence[str], patch: str = "") -> Forked:
    """Start a script as `python SCRIPT OPTIONS` would, with the code `patch` executed before; see `fork`."""
    return fork(directory, run_script, script, [*options], patch)


def run_script(script: Path, options: Sequence[str], patch: str = "") -> None:
    """A script, in this process."""
    exec(patch, {"os": os, "signal": signal, "time": time, "rank": int(os.environ.get("RANK", "0"))})
    sys.argv = [str(script), *options]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def patched(target: str, call: int, ranks: Sequence[int], action: str) -> str:
    """Code that makes some ranks do something just before a function is called for the so manieth time.

    Args:
        target: `package.module:Class.function`.
        call: counted from 1, on each rank.
        ranks: that do it; a process without a launcher is 0.
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


def _run(environment: dict[str, str], streams: list[Path], function: Callable[..., None], arguments: tuple) -> None:
    """In the new process: its environment, its output, then the function."""
    os.environ.update(environment)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    # DeepSpeed and torch collect garbage again and again, of which none is in what was imported.
    gc.freeze()
    gc.enable()
    function(*arguments)
