"""NF4 layers and 8-bit AdamW where parameters are DTensors of two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parents[1] / "tools")])
    launched = subprocess.Popen(
        [*launcher, str(HERE / "quantized_shards.py"), str(tmp_path / "done")],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = launched.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        # The launcher ends its workers when it is asked to, not when it is killed.
        launched.terminate()
        launched.communicate(timeout=60)
        raise
    assert launched.returncode == 0, output
    assert (tmp_path / "done").exists()
