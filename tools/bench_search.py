"""How long the planner searches, imports and the loading of laws apart, for a model of 13 billion parameters.

python tools/bench_search.py

Two jobs with everything open that the planner chooses: on 8 GPUs, and on 64 machines with 8 each. Laws that this
machine has not recorded are recorded first, which takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.cli import run_command
from framework.config import load_config

CONFIG = Path(__file__).parents[1] / "configs" / "llama13b.json"

OPEN = {
    "sharding": {"engine": "auto", "zero_stage": "auto"},
    "selection": {"strategy": "supervised", "ratio": "auto"},
    "retention": {"policy": "auto"},
}

LABELLED_SHARE = 0.3


@dataclass(frozen=True)
class Case:
    """A job's size.

    Attributes:
        nodes: machines of 8 GPUs.
        batch: sequences of a step.
        limit: seconds that its search may take.
    """

    nodes: int
    batch: int
    limit: float


CASES = (Case(1, 64, 1.0), Case(64, 4096, 5.0))


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--runs", type=int, default=5, metavar="N", help="of each job; their median counts (%(default)s)"
    )
    options.add_argument("--gpu-memory", default="24GiB", metavar="SIZE", help="of each GPU (%(default)s)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = options.parse_args()
    started = time.perf_counter()
    import framework.planner.planning  # noqa: F401  # what it takes is printed

    imports = time.perf_counter() - started
    print(f"imports: {imports:.2f} s")
    cases = [measured(case, arguments.runs, arguments.gpu_memory) for case in CASES]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"import_seconds": imports, "cases": cases}, indent=2) + "\n")
    return 0 if all(case["median_seconds"] < case["limit_seconds"] for case in cases) else 1


def measured(case: Case, runs: int, memory: str) -> dict[str, Any]:
    """The figures of a job, printed as well."""
    from framework.planner.hardware import cluster_of
    from framework.planner.planning import PlannedJob
    from framework.planner.profile import assumed_profile

    training = {"training.micro_batch_size": "auto", "training.global_batch_size": case.batch}
    values = {name: json.dumps(value) for name, value in (OPEN | training).items()}
    config = load_config(CONFIG, [f"{name}={value}" for name, value in values.items()])
    cluster = cluster_of(config.hardware, assumed_profile, nodes=case.nodes, gpus_per_node=8, gpu_memory=memory)
    profile = assumed_profile(cluster.device)

    seconds, built, loaded = [], [], []
    for _ in range(runs):
        started = time.perf_counter()
        job = PlannedJob(config, LABELLED_SHARE, lambda line: print(line, file=sys.stderr))
        built.append(time.perf_counter() - started)
        started = time.perf_counter()
        space = job.known(job.space(cluster.ranks, cluster.nodes))
        loaded.append(time.perf_counter() - started)
        started = time.perf_counter()
        # The first search of a job, for which nothing is known yet.
        job.plan(cluster, profile)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    print(
        f"{cluster.ranks} GPUs, {case.batch} sequences, {memory}: {len(space)} candidates, search {median:.3f} s "
        f"(median of {runs}, {min(seconds):.3f} to {max(seconds):.3f}; at most {case.limit:g}); before it the model's "
        f"sizes {statistics.median(built):.2f} s and laws {statistics.median(loaded):.2f} s"
    )
    return {
        "gpus": cluster.ranks,
        "candidates": len(space),
        "median_seconds": median,
        "seconds": seconds,
        "limit_seconds": case.limit,
        "model_seconds": statistics.median(built),
        "laws_seconds": statistics.median(loaded),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
