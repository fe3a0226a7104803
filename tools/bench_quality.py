"""What token selection is worth: evaluation loss after the same measured time, with answers a quarter of the tokens.

    python tools/bench_quality.py --output runs/bench_quality            # about 45 minutes on 2 cores
    python tools/bench_quality.py --output runs/bench_quality --report   # print what is there

A small model is trained on one kind of text, once per seed; from there every arm trains on another kind, instruction
pairs with labels on the answers, for the same time: its number of steps is the budget divided by its median step time,
measured before, all arms in turn. So noise of the machine during the training changes nothing. Every arm has its own
learning rate, the best on held-out pairs with the first seed; if it is the smallest or largest tried, the next one is
tried, too. The reported loss is that of other held-out pairs. Each finished cell is saved, and the same command goes
on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality_arms import ARMS, Arm, Sizes, Training, evaluate, step_seconds
from quality_data import ANSWER_SHARES, QualityData, prepare
from safetensors.torch import load_model, save_model
from torch import nn

START = Arm("start")


class Bench:
    """The cells of one benchmark and their file.

    Args:
        args: the command line.
        data: what to train on.
    """

    def __init__(self, args: argparse.Namespace, data: QualityData) -> None:
        self.args, self.data = args, data
        self.sizes = Sizes(args.hidden, args.depth, data.vocabulary, args.batch, args.sequence, data.pad_token_id)
        self.arms = ARMS
        self.path: Path = args.output / "results.json"
        settings = {
            "sizes": asdict(self.sizes),
            "start_steps": args.start_steps,
            "ordinary_steps": args.ordinary_steps,
            "threads": torch.get_num_threads(),
            "labelled_share": round(data.train.report.labelled_share, 4),
            "answer_shares": list(ANSWER_SHARES),
            "pairs": {"train": len(data.train), "tuning": len(data.tuning), "report": len(data.report)},
        }
        self.results: dict[str, Any] = {"settings": settings, "step_seconds": {}, "cells": {}, "start": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text())
            if self.results["settings"] != settings:
                raise SystemExit(f"error: --output: {self.path} has other settings: {self.results['settings']}")

    def save(self) -> None:
        """Write the results, never half of them."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(temporary, self.path)

    def start(self, seed: int) -> nn.Module:
        """The common starting point of a seed, trained once and kept."""
        path = self.args.output / f"start-{seed}.safetensors"
        model = self.sizes.model(seed)
        if not path.exists():
            training = Training(model, START, self.sizes, self.data.start, seed)
            self._watch(training, f"start, seed {seed}", self.args.start_steps, self.args.start_rate)
            save_model(model, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            self.results["start"][str(seed)] = evaluate(model, self.data.report, self.sizes)
            self.save()
        load_model(model, path)
        return model

    def measure_steps(self) -> dict[str, int]:
        """Steps of each arm within the time of the ordinary arm's."""
        if not self.results["step_seconds"]:
            self.results["step_seconds"] = step_seconds(self.arms, self.sizes, self.data.train, rounds=self.args.rounds)
            self.save()
        seconds = self.results["step_seconds"]
        budget = self.args.ordinary_steps * seconds[self.arms[0].name]
        return {name: max(1, round(budget / value)) for name, value in seconds.items()}

    def cell(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        """One training, unless it is done already."""
        key = f"{arm.name} | {rate:g} | {seed}"
        if key not in self.results["cells"]:
            model = self.start(seed)
            training = Training(model, arm, self.sizes, self.data.train, seed)
            began = time.perf_counter()
            steps = self.measure_steps()[arm.name]
            self._watch(training, key, steps, rate)
            self.results["cells"][key] = {
                "arm": arm.name,
                "rate": rate,
                "seed": seed,
                "steps": steps,
                "seconds": time.perf_counter() - began,
                "tokens": training.tokens,
                "supervised_tokens": training.supervised_tokens,
                "selected_tokens": training.selected_tokens,
                "tuning_loss": evaluate(model, self.data.tuning, self.sizes),
                "loss": evaluate(model, self.data.report, self.sizes),
            }
            self.save()
            cell = self.results["cells"][key]
            print(f"{key}: {cell['steps']} steps, {cell['seconds']:.0f} s, loss {cell['loss']:.4f}", flush=True)
        return self.results["cells"][key]

    def _watch(self, training: Training, name: str, steps: int, rate: float) -> None:
        began = time.perf_counter()
        for step in training.run(steps, rate):
            if step in (steps // 3, 2 * steps // 3):
                print(f"{name}: step {step} of {steps}, {time.perf_counter() - began:.0f} s", flush=True)

    def best_rate(self, arm: Arm) -> float:
        """The learning rate with the lowest loss on the tuning pairs, first seed; none beside it is better."""
        rates = sorted(self.args.rates)
        ratio = rates[1] / rates[0] if len(rates) > 1 else 2.0
        while True:
            losses = {rate: self._comparable(self.cell(arm, rate, self.args.seeds[0])) for rate in rates}
            best = min(rates, key=losses.__getitem__)
            if len(rates) >= self.args.most_rates or best not in (rates[0], rates[-1]):
                return best
            rates = [best / ratio, *rates] if best == rates[0] else [*rates, best * ratio]

    @staticmethod
    def _comparable(cell: dict[str, Any]) -> float:
        return cell["tuning_loss"] if math.isfinite(cell["tuning_loss"]) else math.inf

    def run(self) -> None:
        """All cells: rates first, then the other seeds."""
        self.start(self.args.seeds[0])
        print(f"steps in the same time: {self.measure_steps()}", flush=True)
        best = {arm: self.best_rate(arm) for arm in self.arms}
        for seed in self.args.seeds[1:]:
            for arm, rate in best.items():
                self.cell(arm, rate, seed)

    def report(self) -> str:
        """The finished arms as a markdown table."""
        cells = list(self.results["cells"].values())
        rows: dict[str, list[dict[str, Any]]] = {}
        for arm in self.arms:
            tuned = [cell for cell in cells if cell["arm"] == arm.name and cell["seed"] == self.args.seeds[0]]
            if tuned:
                rate = min(tuned, key=self._comparable)["rate"]
                rows[arm.name] = [cell for cell in cells if cell["arm"] == arm.name and cell["rate"] == rate]
        reference = {cell["seed"]: cell["loss"] for cell in rows.get("supervised", [])}
        ordinary = self.results["step_seconds"][self.arms[0].name]
        lines = [
            "| arm | step time | steps | with gradient | labels trained | rate | loss (nats) | above supervised |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in rows.items():
            losses = [cell["loss"] for cell in row]
            differences = [cell["loss"] - reference[cell["seed"]] for cell in row if cell["seed"] in reference]
            first = row[0]
            lines.append(
                f"| {name} | {self.results['step_seconds'][name] / ordinary:.3f} | {first['steps']} "
                f"| {first['selected_tokens'] / first['tokens']:.2f} | {self._labels(name, first)} "
                f"| {first['rate']:g} | {_spread(losses)} | {_spread(differences, sign='+')} |"
            )
        start = _spread(list(self.results["start"].values()))
        share = self.results["settings"]["labelled_share"]
        lines.append("")
        lines.append(
            f"Mean ± standard deviation over {len(self.args.seeds)} seeds; before fine-tuning {start} nats; "
            f"{share:.1%} of the tokens carry labels; step time in units of `ordinary`'s."
        )
        return "\n".join(lines)

    def _labels(self, name: str, cell: dict[str, Any]) -> str:
        """Labels that entered the loss: a uniform selection drops the others."""
        arm = next(arm for arm in self.arms if arm.name == name)
        share = arm.ratio if arm.strategy == "uniform" and isinstance(arm.ratio, float) else 1.0
        return f"{share * cell['supervised_tokens'] / 1000:.0f} k"


def _spread(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of results and starting points")
    parser.add_argument("--data", type=Path, default=Path("data/default"), help="from tools/make_default_data.py")
    parser.add_argument("--report", action="store_true", help="print the table of what is done, train nothing")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a whole step")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a packed sequence")
    parser.add_argument("--start-steps", type=int, default=120, help="steps to the starting point")
    parser.add_argument("--start-rate", type=float, default=2e-3, help="learning rate of the starting point")
    parser.add_argument("--ordinary-steps", type=int, default=55, help="steps of the ordinary arm: the time budget")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="learning rates to try")
    parser.add_argument("--most-rates", type=int, default=4, help="an arm tries at most so many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each arm")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the table."""
    args = parse(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args, prepare(args.data, args.output, sequence_length=args.sequence))
    if not args.report:
        bench.run()
    print(bench.report())


if __name__ == "__main__":
    main()
