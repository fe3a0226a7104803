"""What each rank holds under every engine: weights, gradients, optimiser state, and the peak of a step.

    python tools/measure_sharding.py --output docs/sharding.md

Real processes on the CPU (gloo), a Llama of some five million parameters in float32, AdamW, one sequence a rank. Held
bytes are those of the storages that the engine names; the peak is that of all live tensor storages of a step, by the
same dispatch-mode tracker that `logging.track_cpu_memory` turns on. The figure is that of the rank with most.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from check_parity import write_data
from parity_cases import ENGINES, MODEL
from torchrun import launch

WORKER = Path(__file__).with_name("sharding_worker.py")
WIDE = MODEL | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
KINDS = ("weights", "gradients", "optimizer", "peak")
MEBIBYTE = 2**20


def config_of(engine: str, directory: Path, ranks: int, precision: str) -> dict[str, Any]:
    """The config of one measurement, as JSON values."""
    return {
        "run": {"output_dir": str(directory / "run")},
        "model": {"from_config": WIDE, "tokenizer": str(directory / "tokenizer")},
        "data": {"train": str(directory / "train.jsonl"), "sequence_length": 96, "cache_dir": None},
        "selection": {"strategy": "supervised"},
        "retention": {"policy": "selective"},
        "sharding": ENGINES.get(engine, {"engine": "single"}),
        "optimizer": {"learning_rate": 1e-4, "precision": precision},
        "training": {"max_steps": 2, "global_batch_size": ranks, "micro_batch_size": 1},
    }


def measure(engines: list[str], ranks: int, directory: Path, precision: str) -> dict[str, dict[str, int]]:
    """Bytes by kind of the rank with most, for each engine."""
    configs, output = directory / "configs.json", directory / "found.json"
    configs.write_text(json.dumps([config_of(engine, directory, ranks, precision) for engine in engines]))
    launch(ranks, WORKER, configs, output)
    found = json.loads(output.read_text())
    return {
        engine: {kind: max(rank[kind] for rank in per_rank) for kind in KINDS}
        for engine, per_rank in zip(engines, found, strict=True)
    }


def table(found: dict[int, dict[str, dict[str, int]]], precision: str, command: str) -> str:
    """Markdown: MiB of the rank with most, by engine, number of ranks and kind."""
    lines = [
        "# What a rank holds",
        "",
        f"Written by `{command}`; MiB of the rank with most, {precision}, full fine-tuning, selective blocks. Weights "
        "are parameters and buffers, gradients what a rank holds before the update, optimiser state the two moments of "
        "AdamW; the peak is that of a whole step, activations and gathered weights included.",
        "",
        f"| engine | ranks | {' | '.join(KINDS)} |",
        "| --- " * (len(KINDS) + 2) + "|",
    ]
    for engine in ["single", *ENGINES]:
        for ranks, by_engine in found.items():
            if engine in by_engine:
                cells = [f"{by_engine[engine][kind] / MEBIBYTE:.2f}" for kind in KINDS]
                lines.append(f"| {engine} | {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--precision", choices=("fp32", "fp32_master", "pure_bf16", "fp16"), default="fp32")
    parser.add_argument("--output", type=Path, help="file for the table")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_data(directory)
        for ranks in arguments.ranks:
            engines = [name for name, options in ENGINES.items() if ranks % options.get("replicas", 1) == 0]
            found[ranks] = measure((["single"] if ranks == 1 else []) + engines, ranks, directory, arguments.precision)
    command = f"python tools/measure_sharding.py {shlex.join(sys.argv[1:])}".strip()
    text = table(found, arguments.precision, command)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
