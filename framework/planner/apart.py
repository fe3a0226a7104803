"""Work in a process of its own, which is a rank of nothing and sees no accelerator. Must not import torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from framework.errors import RunError

_LAST_LINES = 5
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_apart(module: str, request: Any, *, failure: str) -> Any:
    """Run `python -m MODULE REQUEST ANSWER`, where both files are JSON.

    Args:
        module: to run.
        request: JSON values that it reads.
        failure: begins the message if it fails.

    Returns:
        The JSON values that it writes.

    Raises:
        RunError: it fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        asked, answer = Path(directory, "request.json"), Path(directory, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, str(asked), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
            raise RunError(f"{failure}:\n{last}")
        return json.loads(answer.read_text(encoding="utf-8"))
