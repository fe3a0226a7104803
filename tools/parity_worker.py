"""Runs a list of configs, one after the other, on the ranks of one launch; started by `check_parity.py`.

torchrun --nproc-per-node 2 tools/parity_worker.py CONFIGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import framework
from framework.cli import run_command
from framework.config import Config
from framework.sharding.place import Place
from framework.sharding.ranks import joined_ranks


def main(path: Path) -> None:
    """Train every config in the file; the connections stay from run to run."""
    with joined_ranks(Place.of_environment(), timeout_seconds=300):
        for number, values in enumerate(configs := json.loads(path.read_text())):
            print(f"run {number + 1} of {len(configs)}: {values['run']['output_dir']}", flush=True)
            framework.train(Config.model_validate_json(json.dumps(values)), resume="none")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(Path(sys.argv[1]))))
