"""Starts a script in several processes on this machine, as tools that need ranks do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT_SECONDS = 3600


def launch(ranks: int, script: Path, *arguments: Path | str) -> None:
    """Run a script under `torchrun` on so many ranks; ends this process with what they wrote if they fail."""
    options = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    command = [sys.executable, *options, "--rdzv-endpoint", "localhost:0", str(script), *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=TIMEOUT_SECONDS
    )
    if done.returncode:
        sys.exit(f"error: the launch with {ranks} ranks failed:\n{done.stdout[-6000:]}")
