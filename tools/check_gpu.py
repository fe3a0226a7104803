"""Predicted peaks and step times against measured ones of real configurations, on this machine's accelerator.

    python tools/check_gpu.py --measure runs/gpu.json --output docs/gpu.md
    python tools/check_gpu.py --score runs/gpu.json --output docs/gpu.md
    python tools/check_gpu.py --neighbours --measure runs/gpu_neighbours.json --profile docs/gpu.profile.json

Measures the machine first, as `launchers/plan.py --calibrate` does. Then each case is a process of its own that builds
the model and trains it: `torch.cuda.max_memory_allocated` and `max_memory_reserved` of five steps, and the median time
of the last three. Predictions come from the planner as a user meets it; scoring alone needs no accelerator.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_cases import CASES, NEIGHBOURS, GpuCase

from framework.config import Config
from framework.planner.choice import Choice
from framework.planner.hardware import Cluster, cluster_of
from framework.planner.planning import PlannedJob, learn
from framework.planner.profile import Profile, load_profile
from framework.planner.rates import rates_of

WORKER = Path(__file__).with_name("gpu_worker.py")
GIB = 2**30
CALIBRATION_SECONDS = 60.0


@dataclass(frozen=True)
class Prediction:
    """Of a step: bytes and seconds."""

    allocated: int
    tensors: int
    reserved: int
    seconds: float
    phase: str


def measured(cases: Sequence[GpuCase], path: Path, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """What each case takes, one after the other; the next processes import their libraries while one measures.

    Args:
        cases: any.
        path: of a JSON file, written anew after each case.
        say: is told what was found.
    """
    found = []
    with tempfile.TemporaryDirectory() as directory:
        started: list[tuple[subprocess.Popen[str], Path]] = []

        def start(number: int) -> None:
            case = cases[number]
            asked, answer = Path(directory, f"{number}.case.json"), Path(directory, f"{number}.json")
            asked.write_text(json.dumps({"config": case.config(), "length": case.length - 1, "prompt": case.prompt}))
            command = [sys.executable, str(WORKER), str(asked), str(answer)]
            pipe = subprocess.PIPE
            started.append(
                (subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True), answer)
            )

        for number, case in enumerate(cases):
            for ahead in range(len(started), min(number + 3, len(cases))):
                start(ahead)
            process, answer = started[number]
            output, _ = process.communicate("begin\n")
            result = json.loads(answer.read_text()) if answer.exists() else {"error": output[-2000:]}
            found.append({"case": asdict(case)} | result)
            path.write_text(json.dumps(found, indent=1))
            say(f"{number + 1}/{len(cases)} {name(case)}: {result.get('error') or words(result)}")
    return found


def name(case: GpuCase) -> str:
    """A case in a few words."""
    packed = " packed" if case.packing else ""
    passes = f"{case.accumulation} x " if case.accumulation > 1 else ""
    return (
        f"{case.model}, {case.tuning}, {case.precision}, {case.optimizer}, {case.arm}, "
        f"{passes}{case.batch} x {case.length}{packed}"
    )


def words(result: dict[str, Any]) -> str:
    """A measurement in a few words."""
    sizes = ", ".join(f"{key} {result[key] / GIB:.3f}" for key in ("allocated", "reserved", "tensors", "held"))
    return f"{sizes} GiB, {result['seconds'] * 1e3:.1f} ms"


def predictions(
    cases: Sequence[tuple[GpuCase, dict[str, Any]]], profile: Profile, say: Callable[[str], None] = print
) -> list[Prediction]:
    """What the planner says of each case, with the sizes of its micro-batches."""
    cluster = cluster_of(Config.model_validate(cases[0][0].config()).hardware, lambda _: profile, device=profile.device)
    jobs = [PlannedJob(Config.model_validate_json(json.dumps(case.config())), 0.25, say) for case, _ in cases]
    found = []
    for job, (case, measurement) in zip(jobs, cases, strict=True):
        say(name(case))
        learn([(job, job.space(1, 1))], say)
        if reasons := [*job.missing(job.space(1, 1))]:
            raise SystemExit(f"error: {name(case)}: {'; '.join(reasons)}")
        found.append(_prediction(job, cluster, profile, measurement["sizes"]))
    return found


def _prediction(job: PlannedJob, cluster: Cluster, profile: Profile, sizes: dict[str, float]) -> Prediction:
    choice = Choice.of(job.config, 1, sizes["labels"] / (sizes["batch"] * sizes["tokens"]))
    ledger = job.memory.at(choice, job.memory.sizes(choice) | sizes).with_workspaces(profile.workspace_bytes)
    seconds = job.time.step(choice, rates_of(job.config, cluster, profile)).total
    reserved = round(ledger.peak * profile.reserved_ratio)
    return Prediction(ledger.peak, ledger.tensors, reserved, seconds, ledger.binding_phase)


def document(rows: Sequence[tuple[GpuCase, dict[str, Any], Prediction]], command: str) -> str:
    """Markdown: a table of the cases, errors as predicted / measured - 1, and their medians and maxima."""
    device = rows[0][1]["device"]
    columns = ("model", "trained", "precision", "optimizer", "retention", "batch")
    figures = ("allocated, GiB", "error", "reserved, GiB", "error", "step, ms", "error")
    lines = [
        "# Predicted and measured on a GPU",
        "",
        f"Written by `{command}`, on one {device}; errors are predicted / measured - 1.",
        "",
        f"| {' | '.join(columns + figures)} |",
        "| --- " * len(columns) + "| ---: " * len(figures) + "|",
    ]
    errors: dict[str, list[float]] = {"allocated": [], "reserved": [], "step time": []}
    for case, found, predicted in rows:
        own = (
            predicted.allocated / found["allocated"] - 1,
            predicted.reserved / found["reserved"] - 1,
            predicted.seconds / found["seconds"] - 1,
        )
        for each, error in zip(errors.values(), own, strict=True):
            each.append(abs(error))
        passes = f"{case.accumulation} x " if case.accumulation > 1 else ""
        cells = (
            case.model,
            case.tuning,
            case.precision,
            case.optimizer,
            case.arm,
            f"{passes}{case.batch} x {case.length}{', packed' * case.packing}",
            f"{found['allocated'] / GIB:.2f}",
            f"{own[0]:+.2%}",
            f"{found['reserved'] / GIB:.2f}",
            f"{own[1]:+.1%}",
            f"{found['seconds'] * 1e3:.0f}",
            f"{own[2]:+.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| error of | median | largest |", "| --- | ---: | ---: |"]
    lines += [f"| {kind} | {statistics.median(own):.2%} | {max(own):.2%} |" for kind, own in errors.items()]
    return "\n".join(lines) + "\n"


def chosen(rows: Sequence[tuple[GpuCase, dict[str, Any], Prediction]]) -> str:
    """What a planner chooses that looks for speed, beside the fastest of the measured ways to run a job."""
    case, found, _ = min(rows, key=lambda row: row[2].seconds)
    best, fastest, _ = min(rows, key=lambda row: row[1]["seconds"])
    share = fastest["seconds"] / found["seconds"]
    return f"\nPredicted to be the fastest: {_way(case)}. Measured: {_way(best)}, so {share:.1%} of the throughput.\n"


def _way(case: GpuCase) -> str:
    return f"{case.arm}, {case.accumulation} x {case.batch} rows"


def calibrated(path: Path) -> None:
    """Measure this machine and store its profile."""
    import torch

    from framework.planner.calibration import calibrate
    from framework.sharding.place import Place
    from framework.sharding.ranks import Ranks

    calibrate(torch.device("cuda:0"), Ranks(Place()), CALIBRATION_SECONDS).save(path)


def main() -> None:
    """Measure, or read what was measured; then predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--measure", type=Path, help="measure, and write here what was found")
    source.add_argument("--score", type=Path, help="read what was found before")
    parser.add_argument("--output", type=Path, help="Markdown file")
    parser.add_argument("--neighbours", action="store_true", help="the ways to run one job instead of the cases")
    parser.add_argument("--unscored", action="store_true", help="measure only")
    parser.add_argument(
        "--profile", type=Path, help="of the machine; by default it is measured, or the one beside --score"
    )
    arguments = parser.parse_args()
    path = arguments.measure or arguments.score
    stored = arguments.profile or path.with_suffix(".profile.json")
    if arguments.measure:
        path.parent.mkdir(parents=True, exist_ok=True)
        if arguments.profile is None:
            # In a process that ends, for its context takes memory.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
                apart.submit(calibrated, stored).result()
        measured(NEIGHBOURS if arguments.neighbours else CASES, path)
        if arguments.unscored:
            return
    found = [each for each in json.loads(path.read_text()) if "error" not in each]
    profile = load_profile(stored)
    cases = [(GpuCase(**each["case"]), each) for each in found]
    rows = [(case, each, told) for (case, each), told in zip(cases, predictions(cases, profile), strict=True)]
    text = document(rows, f"python tools/check_gpu.py {shlex.join(sys.argv[1:])}")
    if arguments.neighbours:
        text += chosen(rows)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
