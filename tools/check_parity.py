"""The same job under every engine, number of ranks and split gives the losses of one process.

    python tools/check_parity.py                        # a pairwise cover of the matrix
    python tools/check_parity.py --all --output docs/parity.md
    python tools/check_parity.py --engines FSDP2 "ZeRO 3" --precision fp32_master

Each run is `framework.train` on a config, in real processes that `torchrun` starts (gloo on the CPU, NCCL where there
are GPUs): a small Llama with grouped-query attention, answers to questions of different lengths, weight decay, a
schedule and clipping at work. What is compared are the losses of all steps with those of one process that takes the
whole batch at once: the largest |difference| / |loss|. Exit code 1 if it is above the precision's limit anywhere.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from chat_tokenizer import save_tokenizer, train_sentencepiece
from parity_cases import ACCUMULATION, ADAPTERS, ARMS, ENGINES, RANKS, Case, pairwise_cover, whole_matrix
from torchrun import launch

from framework.training.run_directory import COMPLETED

WORKER = Path(__file__).with_name("parity_worker.py")
LIMITS = {"fp32": 1e-5, "fp32_master": 2e-2, "pure_bf16": 2e-2, "fp16": 5e-3}
"""Largest relative difference of a loss, by precision; bf16 has 8 bits of precision, which is 4e-3 a rounding."""


def write_data(directory: Path) -> None:
    """Sums in words as questions and answers of different lengths, and a tokenizer trained on them."""
    draw = random.Random(0)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def spelt(number: int) -> str:
        return " ".join(words[int(digit)] for digit in str(number))

    lines = []
    for _ in range(96):
        left, right = draw.randrange(10 ** draw.randrange(1, 4)), draw.randrange(10 ** draw.randrange(1, 4))
        messages = [
            {"role": "user", "content": f"What is {spelt(left)} plus {spelt(right)}?"},
            {"role": "assistant", "content": spelt(left + right)},
        ]
        lines.append(json.dumps({"messages": messages}))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_tokenizer(train_sentencepiece(lines, vocabulary=300, threads=1), directory / "tokenizer")


def run_cases(cases: Sequence[Case], directory: Path, steps: int) -> None:
    """Run all cases that are not finished yet, those of equal numbers of ranks in one launch."""
    for ranks in RANKS:
        configs = [case.config(directory, steps) for case in cases if case.ranks == ranks]
        configs = [config for config in configs if not (Path(config["run"]["output_dir"]) / COMPLETED).exists()]
        if not configs:
            continue
        path = directory / f"configs-{ranks}.json"
        path.write_text(json.dumps(configs))
        launch(ranks, WORKER, path)


def losses(case: Case, directory: Path) -> list[float]:
    """Of all steps of a finished run."""
    run = Path(case.config(directory, 1)["run"]["output_dir"])
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def differences(cases: Iterable[Case], directory: Path, steps: int) -> dict[Case, float]:
    """The largest relative difference of each case's losses from its baseline's."""
    found = {}
    for case in cases:
        own, expected = losses(case, directory), losses(case.baseline(), directory)
        assert len(own) == len(expected) == steps, case
        found[case] = max(abs(a - b) / abs(b) for a, b in zip(own, expected, strict=True))
    return found


def table(found: dict[Case, float], limit: float, steps: int, command: str) -> str:
    """Markdown: the worst difference for each engine and number of ranks, and for each engine and arm."""
    precision = next(iter(found)).precision
    lines = [
        "# Parity of engines",
        "",
        f"Written by `{command}`: {len(found)} runs of {steps} steps in {precision}, each compared with one process "
        f"that takes the whole batch at once. Largest relative difference of a loss; the limit is {limit:g}. "
        f"{sum(value <= limit for value in found.values())} of {len(found)} runs are within it.",
        "",
        *_grid(found, "ranks", RANKS),
        "",
        *_grid(found, "accumulation", ACCUMULATION),
        "",
        *_grid(found, "arm", ARMS),
        "",
        *_grid(found, "adapter", ADAPTERS),
    ]
    return "\n".join(lines) + "\n"


def _grid(found: dict[Case, float], setting: str, values: Iterable) -> list[str]:
    """A table of the worst differences, a row for each engine and a column for each value of a setting."""
    columns = [value for value in values if any(getattr(case, setting) == value for case in found)]
    engines = [engine for engine in ENGINES if any(case.engine == engine for case in found)]
    lines = [f"| {setting}: | {' | '.join(map(str, columns))} |", "| --- " * (len(columns) + 1) + "|"]
    for engine in engines:
        cells = []
        for column in columns:
            own = [v for case, v in found.items() if case.engine == engine and getattr(case, setting) == column]
            cells.append(f"{max(own):.1e}" if own else "")
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Run, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the whole matrix instead of a pairwise cover")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=[*ENGINES], help="only these")
    parser.add_argument("--precision", choices=LIMITS, default="fp32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, help="file for the table")
    parser.add_argument(
        "--directory",
        type=Path,
        help="where the runs go, and where an interrupted check goes on; a temporary directory by default",
    )
    arguments = parser.parse_args()
    cases = [case for case in whole_matrix() if case.engine in arguments.engines]
    cases = cases if arguments.all else pairwise_cover(cases)
    cases = [Case(**{**vars(case), "precision": arguments.precision}) for case in cases]
    baselines = [*dict.fromkeys(case.baseline() for case in cases)]
    with tempfile.TemporaryDirectory() as temporary:
        directory = (arguments.directory or Path(temporary)).resolve()
        write_data(directory)
        run_cases([*baselines, *cases], directory, arguments.steps)
        found = differences(cases, directory, arguments.steps)
    limit = LIMITS[arguments.precision]
    text = table(found, limit, arguments.steps, f"python tools/check_parity.py {shlex.join(sys.argv[1:])}".strip())
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    outside = {case: value for case, value in found.items() if value > limit}
    for case, value in outside.items():
        print(f"outside: {case}: {value:.2e}", file=sys.stderr)
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
