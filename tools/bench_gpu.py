"""Tokens per second and peak bytes of retention policies on one GPU; `gpu_speed.py` makes a table of them.

    python tools/bench_gpu.py --model Llama-3-8B --tuning LoRA full --sequences 4096 32768 --output docs/speed.json
    python tools/bench_gpu.py --cap 24 --model Llama-3-8B --tuning LoRA --output docs/cap.json

Every arm of a row takes the same step (forward, backward, fused AdamW with learning rate 0) on the same weights and
batch, in one process. The labels are the last tokens of each sequence, a tenth of them; a ratio adds context before
them, so that exact and selective arms have one loss. `best_exact` is `tools/best_exact.py`, with cuDNN's attention.
With `--cap` the process may take so many GiB; each arm's longest sequence is found from the peaks of two short ones and
then run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_step import build_model, draw_batch
from gpu_cases import MODELS
from step_cost import Arm, Case
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from framework.selection import Selection

GIB = 2**30
LABELLED = 0.1
EXACT = [Arm("all"), Arm("checkpoint"), Arm("best_exact")]
LORA_RANK = 16
ROUND = 1024
"""Tokens that lengths of sequences are multiples of."""


def arms_of(ratios: Sequence[float], *, compile: bool = False) -> list[Arm]:
    """The exact ones, selective ones with retained linears, and for the middle ratio without, and on the host.

    Then, if asked, those without `best_exact` and the host with compiled blocks.
    """
    middle = sorted(ratios)[len(ratios) // 2]
    others = [Arm("selective", middle), Arm("selective", middle, True, placement="host")]
    retained = [Arm("selective", ratio, True) for ratio in ratios]
    plain = [*EXACT[:2], *retained, others[0]] if compile else []
    return [*EXACT, *retained, *others, *(replace(arm, compile=True) for arm in plain)]


class Bench:
    """One model's weights and the arms on them.

    Args:
        model: in train mode on the device.
        batch: sequences.
        sequence: tokens of each.
        arms: to be measured.
    """

    def __init__(self, model: nn.Module, batch: int, sequence: int, arms: Sequence[Arm]) -> None:
        self.model, self.tokens = model, batch * sequence
        device = next(model.parameters()).device
        ratios = sorted({LABELLED} | {arm.ratio for arm in arms if arm.policy == "selective"})
        inputs, selections = draw_batch(
            batch=batch,
            sequence=sequence,
            vocabulary=model.config.vocab_size,
            ratios=ratios,
            answers=True,
            device=device,
        )
        self.selections = {
            ratio: Selection(s.positions.cpu(), s.valid.cpu(), s.probability.cpu(), s.ragged)
            for ratio, s in selections.items()
        }
        self.case = Case(model, inputs, self.selections, arms)

    def optimizer_seconds(self) -> float:
        """The median time of the optimiser's step, with gradients of zero."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        seconds = []
        for _ in range(4):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            self.case.optimizer.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        self.case.optimizer.zero_grad(set_to_none=True)
        return statistics.median(seconds[1:])

    def profile(self, arm: Arm) -> str:
        """Where the device's time of one step goes, by operator."""
        self.case.step(arm)
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profiler:
            self.case.step(arm)
        return profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=60)

    def measure(self, arm: Arm, steps: int) -> dict[str, Any]:
        """Seconds, tokens per second and peak bytes, weights and optimiser included, or the error."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if arm.policy == "best_exact" else contextlib.nullcontext():
                self.case.step(arm)
                seconds = [self.case.step(arm) for _ in range(steps)]
        except torch.OutOfMemoryError:
            self.case.optimizer.zero_grad(set_to_none=True)
            return {"error": "out of memory"}
        return {
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "tokens_per_second": self.tokens / statistics.median(seconds),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }


def speeds(
    model: nn.Module, batch: int, sequence: int, arms: Sequence[Arm], steps: int, *, profile: bool
) -> tuple[list[dict[str, Any]], float]:
    """A row for each arm, and the optimiser's seconds."""
    bench = Bench(model, batch, sequence, arms)
    rows = []
    for arm in arms:
        found = {"arm": arm.name, "batch": batch, "sequence": sequence, **bench.measure(arm, steps)}
        rows.append(found)
        print(json.dumps(found), flush=True)
        if profile and arm.policy == "selective":
            print(bench.profile(arm), flush=True)
    return rows, bench.optimizer_seconds()


def longest(model: nn.Module, arms: Sequence[Arm], cap: int, probes: tuple[int, int]) -> list[dict[str, Any]]:
    """The longest sequence that each arm takes under a cap, and its speed there.

    Args:
        model: on the device.
        arms: to be measured.
        cap: bytes that the process may take.
        probes: tokens of two sequences that every arm can take.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    rows = []
    for arm in arms:
        low, high = (Bench(model, 1, tokens, [arm]).measure(arm, 1) for tokens in probes)
        if "error" in low or "error" in high:
            rows.append({"arm": arm.name, "error": f"out of memory at {probes}"})
            continue
        slope = (high["peak_reserved_bytes"] - low["peak_reserved_bytes"]) / (probes[1] - probes[0])
        room = cap - high["peak_reserved_bytes"]
        tokens = math.floor((probes[1] + room / slope) / ROUND) * ROUND
        found: dict[str, Any] = {"error": "none fits"}
        for length in (
            tokens + 2 * ROUND,
            tokens,
            round(tokens * 0.95 / ROUND) * ROUND,
            round(tokens * 0.85 / ROUND) * ROUND,
        ):
            found = Bench(model, 1, length, [arm]).measure(arm, 1)
            if "error" not in found:
                break
        rows.append({"arm": arm.name, "sequence": length, **found})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Llama-3-8B")
    parser.add_argument("--tuning", nargs="+", choices=["full", "LoRA"], default=["LoRA", "full"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[4096, 32768], help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=0, help="of a micro-batch, at least a sequence (default: one)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.25, 0.5])
    parser.add_argument("--compile", action="store_true", help="measure most arms with compiled blocks, too")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--blocks", type=int, help="of the model, instead of its own")
    parser.add_argument("--cap", type=float, help="GiB that the process may take: find the longest sequences")
    parser.add_argument("--profile", action="store_true", help="print where the time of the selective arms goes")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(0), "model": args.model, "rows": []}
    result["optimizer_seconds"] = {}
    for tuning in args.tuning:
        depth = args.blocks or MODELS[args.model]["num_hidden_layers"]
        sizes = MODELS[args.model] | {"max_position_embeddings": 2**20}
        begun = time.perf_counter()
        model = build_model(
            sizes,
            depth=depth,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
            adapter_rank=LORA_RANK if tuning == "LoRA" else 0,
        )
        print(f"{args.model}, {tuning}: built in {time.perf_counter() - begun:.0f} s", flush=True)
        if args.cap:
            kept = ({}, {"kv_format": "int8"}, {"placement": "host"})
            arms = [*EXACT, *(Arm("selective", r, **options) for r in args.ratios for options in kept)]
            rows = longest(model, arms, round(args.cap * GIB), (2048, 4096))
            result["rows"] += [{"tuning": tuning, "cap_gib": args.cap, **row} for row in rows]
        else:
            for sequence in args.sequences:
                arms = arms_of(args.ratios, compile=args.compile)
                rows, result["optimizer_seconds"][tuning] = speeds(
                    model, max(1, args.tokens // sequence), sequence, arms, args.steps, profile=args.profile
                )
                result["rows"] += [{"tuning": tuning, **row} for row in rows]
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
