"""Work in a process of its own, which is a rank of nothing and sees no accelerator. Must not import torch.

`python -m framework.planner.apart MODULE REQUEST ANSWER` is such a process.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from framework.errors import RunError
from framework.extras import put_off_import
from framework.importing import quick_imports

_LAST_LINES = 5
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_apart(module: str, request: Any, *, failure: str) -> Any:
    """Call `MODULE.main(REQUEST, ANSWER)`, two paths, where both files are JSON.

    Args:
        module: with the function.
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
        command = [sys.executable, "-m", "framework.planner.apart", module, str(asked), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
            raise RunError(f"{failure}:\n{last}")
        return json.loads(answer.read_text(encoding="utf-8"))


def main(name: str, request: Path, answer: Path) -> None:
    """In the new process: do what was asked for."""
    with put_off_import("bitsandbytes"):
        with quick_imports():
            module = import_module(name)
        # Garbage is looked for again and again; none is in what was imported.
        gc.freeze()
        module.main(request, answer)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
