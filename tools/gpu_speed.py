"""A table of what `bench_gpu.py` measured, beside the bounds that counting operations gives. Needs no accelerator.

    python tools/gpu_speed.py docs/speed.json --output docs/speed.md

The bound of an arm is the time of forward and backward pass of the first exact arm that fits (`all`, or `checkpoint`)
times the operations that the arm needs over those that this one runs, plus the optimiser's time, which was measured by
itself: `framework/training/flops.py` says what counts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from bench_gpu import GIB, LABELLED, LORA_RANK, arms_of
from bench_step import build_model, draw_batch
from gpu_cases import MODELS
from step_cost import Arm, counted
from torch import nn

from framework.models.products import matrix_products
from framework.models.wrapping import unwrapped
from framework.retention import blocks_of

RATIOS = (0.1, 0.25, 0.5)


def operations(model: nn.Module, arm: Arm, batch: int, sequence: int) -> int:
    """Floating-point operations that the arm's step needs, recomputation included for those that recompute."""
    inner = unwrapped(model)
    ratios = sorted({LABELLED, arm.ratio}) if arm.policy == "selective" else [LABELLED]
    inputs, selections = draw_batch(
        batch=batch, sequence=sequence, vocabulary=1000, ratios=ratios, answers=True, device=torch.device("cpu")
    )
    selection = selections[arm.ratio] if arm.policy == "selective" else None
    flops = counted(matrix_products(inner, blocks_of(inner)), arm, inputs["labels"], selection)
    return flops.hardware if arm.policy in ("checkpoint", "best_exact") else flops.model


def document(result: dict[str, Any], command: str) -> str:
    """Markdown."""
    arms = {arm.name: arm for arm in arms_of(RATIOS, compile=True)}
    lines = [
        "# Speed and memory on one GPU",
        "",
        f"Written by `{command}` from what `tools/bench_gpu.py` measured: {result['model']}, bfloat16, on one "
        f'{result["device"]}. Labels: the last tenth of each sequence. "Of the bound" is the bound\'s time over the '
        "measured one.",
        "",
        "| trained | batch | retention | tokens/s | peak, GiB | step, s | bound, s | of the bound |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tuning in dict.fromkeys(row["tuning"] for row in result["rows"]):
        with torch.device("meta"):
            model = build_model(
                MODELS[result["model"]] | {"max_position_embeddings": 2**20},
                depth=MODELS[result["model"]]["num_hidden_layers"],
                dtype=torch.bfloat16,
                device=torch.device("meta"),
                adapter_rank=LORA_RANK if tuning == "LoRA" else 0,
            )
        for sequence in dict.fromkeys(row["sequence"] for row in result["rows"]):
            rows = [row for row in result["rows"] if (row["tuning"], row["sequence"]) == (tuning, sequence)]
            fits = [row for row in rows if "seconds" in row]
            if not fits:
                continue
            counts = {row["arm"]: operations(model, arms[row["arm"]], row["batch"], sequence) for row in fits}
            optimizer = result["optimizer_seconds"][tuning]
            rate = (fits[0]["seconds"] - optimizer) / counts[fits[0]["arm"]]
            for row in rows:
                cells = [tuning, f"{row['batch']} x {sequence}", row["arm"]]
                if "seconds" not in row:
                    lines.append(f"| {' | '.join(cells)} | {row['error']} | | | | |")
                    continue
                bound = rate * counts[row["arm"]] + optimizer
                cells += [f"{row['tokens_per_second']:.0f}", f"{row['peak_bytes'] / GIB:.1f}", f"{row['seconds']:.3f}"]
                cells += ["", ""] if row is fits[0] else [f"{bound:.3f}", f"{bound / row['seconds']:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="JSON file of bench_gpu.py")
    parser.add_argument("--output", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    command = f"python tools/gpu_speed.py {shlex.join(sys.argv[1:])}"
    text = document(json.loads(arguments.measured.read_text()), command)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
