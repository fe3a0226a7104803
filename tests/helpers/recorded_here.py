"""What the planner does in a process of its own, done in the one that asks, which saves the start of another."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framework.planner import apart, laws


@contextmanager
def recorded_here() -> Iterator[None]:
    """Within this context they are."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        *_, module, request, answer = command
        import_module(module).main(Path(request), Path(answer))
        # Models and their hooks are cycles; what is left of them would be counted by whoever looks for tensors.
        gc.collect()
        return subprocess.CompletedProcess(command, 0, "", "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "subprocess", SimpleNamespace(run=run))
        # A process records one law at a time.
        patch.setattr(laws, "MOST_PROCESSES", 1)
        yield
