"""Real clusters, and runs that are submitted to them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from slurm_cluster import Lab, can_crash
from slurm_files import LabError, Settings
from slurm_runs import Runs

REQUIRED = "SELECTRAIN_REQUIRE_SLURM"


@contextmanager
def started_lab(settings: Settings) -> Iterator[Lab]:
    """A cluster of its own; without SLURM the test is skipped, or fails where it has to be there."""
    # Not pytest's own directory, which only its owner may enter.
    directory = Path(tempfile.mkdtemp(prefix="selectrain-lab-"))
    directory.chmod(0o755)
    lab = Lab(directory)
    try:
        try:
            lab.up(settings)
        except LabError as error:
            lacking(f"no SLURM cluster: {error}")
        yield lab
        lab.down()
    finally:
        shutil.rmtree(directory)


def lacking(what: str) -> NoReturn:
    """Skip a test, or fail it where this must not be."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set; {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def crashing_nodes(cluster: Lab) -> Lab:
    """A cluster whose nodes can crash."""
    if not can_crash():
        lacking("only root can give nodes process namespaces, without which they cannot crash")
    return cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Lab]:
    """Three nodes."""
    with started_lab(Settings(nodes=3, gpus=2)) as lab:
        yield lab


@pytest.fixture
def runs(cluster: Lab, tmp_path: Path, tiny_tokenizer_path: Path) -> Iterator[Runs]:
    """Runs of a test, which gets all nodes and leaves no job."""
    yield Runs(cluster, tmp_path, tiny_tokenizer_path)
    cluster.call("scancel", "--user", str(os.getuid()))
    # Those that a test has drained; SLURM refuses it for others.
    cluster.call("scontrol", "update", "nodename=ALL", "state=resume", check=False)
    cluster.wait_until_idle()


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_path: Path) -> Iterator[Runs]:
    """A run that needs longer than its job may, on a cluster of its own, beside other tests of a module."""
    # SLURM looks at its jobs every 30 s and may send the signal by that much early: 45 to 75 s after the start, which
    # takes some of it where tests run side by side.
    limits = {"cluster__time": "2", "cluster__stop_seconds": 45}
    with started_lab(Settings(nodes=1, gpus=1)) as lab:
        runs = Runs(lab, tmp_path_factory.mktemp("limited"), tiny_tokenizer_path)
        runs.submit(runs.config(training__max_steps=90, step_seconds=1, sharding__engine="single", **limits))
        yield runs
