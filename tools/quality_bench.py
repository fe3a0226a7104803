"""The cells of a quality benchmark: what is trained, for how long, at which learning rate; all of it resumable."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality_arms import ORDINARY, Arm, Sizes, Training, step_seconds
from safetensors.torch import load_model, save_model
from torch import nn

from framework.data import TokenizedDataset

Cell = dict[str, Any]


class Bench(ABC):
    """The cells of one task and their file.

    Args:
        args: the command line.
        task: names the files.
        sizes: of model and batch.
        arms: to compare; the first one is `ordinary`.
        train: what every arm trains on.
        settings: of the task, which the file must agree with.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        task: str,
        sizes: Sizes,
        arms: Sequence[Arm],
        train: TokenizedDataset,
        settings: dict[str, Any],
    ) -> None:
        if unknown := set(args.arms or ()) - {arm.name for arm in arms}:
            raise SystemExit(f"error: --arms: no {unknown} among {[arm.name for arm in arms]}")
        self.arms = [arm for arm in arms if args.arms is None or arm is ORDINARY or arm.name in args.arms]
        self.args, self.task, self.sizes, self.train = args, task, sizes, train
        self.path: Path = args.output / f"{task}.json"
        settings = {
            "sizes": asdict(sizes),
            "start_steps": args.start_steps,
            "ordinary_steps": args.ordinary_steps,
            "threads": torch.get_num_threads(),
            "labelled_share": round(train.report.labelled_share, 4),
            **settings,
        }
        self.results: dict[str, Any] = {"settings": settings, "step_seconds": {}, "cells": {}, "start": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text())
            if self.results["settings"] != settings:
                raise SystemExit(f"error: --output: {self.path} has other settings: {self.results['settings']}")

    @abstractmethod
    def train_start(self, model: nn.Module, seed: int) -> None:
        """Bring a random model to the starting point of all arms, in place."""

    @abstractmethod
    def scores(self, model: nn.Module) -> dict[str, Any]:
        """What is reported of a model in train mode, which it stays in."""

    @abstractmethod
    def train_cell(self, training: Training, name: str, steps: int, rate: float) -> dict[str, Any]:
        """Train from the starting point for `steps`, the equal time's; the scores, with `tuning_loss` among them."""

    @abstractmethod
    def report(self) -> str:
        """The finished arms as markdown."""

    def save(self) -> None:
        """Write the results, never half of them."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(temporary, self.path)

    def start(self, seed: int) -> nn.Module:
        """The common starting point of a seed, trained once and kept."""
        path = self.args.output / f"{self.task}-start-{seed}.safetensors"
        model = self.sizes.model(seed)
        if not path.exists():
            self.train_start(model, seed)
            save_model(model, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            self.results["start"][str(seed)] = self.scores(model)
            self.save()
        load_model(model, path)
        return model

    def measure_steps(self) -> dict[str, int]:
        """Steps of each arm within the time of the ordinary arm's."""
        if not self.results["step_seconds"]:
            self.results["step_seconds"] = step_seconds(self.arms, self.sizes, self.train, rounds=self.args.rounds)
            self.save()
        seconds = self.results["step_seconds"]
        budget = self.args.ordinary_steps * seconds[ORDINARY.name]
        return {name: max(1, round(budget / value)) for name, value in seconds.items()}

    def cell(self, arm: Arm, rate: float, seed: int) -> Cell:
        """One training, unless it is done already."""
        key = f"{arm.name} | {rate:g} | {seed}"
        if key not in self.results["cells"]:
            training = Training(self.start(seed), arm, self.sizes, self.train, seed)
            steps, began = self.measure_steps()[arm.name], time.perf_counter()
            scores = self.train_cell(training, key, steps, rate)
            self.results["cells"][key] = {
                "arm": arm.name,
                "rate": rate,
                "seed": seed,
                "steps": steps,
                "seconds": time.perf_counter() - began,
                "selected_share": training.selected_tokens / training.tokens,
                **scores,
            }
            self.save()
            print(f"{key}: {steps} steps, {time.perf_counter() - began:.0f} s, {scores}", flush=True)
        return self.results["cells"][key]

    def watch(self, training: Training, name: str, steps: int, rate: float) -> None:
        """Take all steps of a cosine schedule and say how far they are."""
        began = time.perf_counter()
        for step in training.run(steps, rate):
            if step in (steps // 3, 2 * steps // 3):
                print(f"{name}: step {step} of {steps}, {time.perf_counter() - began:.0f} s", flush=True)

    def best_rate(self, arm: Arm) -> float:
        """The learning rate with the lowest loss on the tuning data, first seed; none beside it is better."""
        rates = sorted(self.args.rates)
        ratio = rates[1] / rates[0] if len(rates) > 1 else 2.0
        while True:
            losses = {rate: comparable(self.cell(arm, rate, self.args.seeds[0])) for rate in rates}
            best = min(rates, key=losses.__getitem__)
            if len(rates) >= self.args.most_rates or best not in (rates[0], rates[-1]):
                return best
            rates = [best / ratio, *rates] if best == rates[0] else [*rates, best * ratio]

    def run(self) -> None:
        """All cells: rates first, then the other seeds."""
        print(f"steps in the same time: {self.measure_steps()}", flush=True)
        best = {arm: self.best_rate(arm) for arm in self.arms}
        for seed in self.args.seeds[1:]:
            for arm, rate in best.items():
                self.cell(arm, rate, seed)

    def relative_time(self, name: str) -> float:
        """Step time of an arm in units of the ordinary one's."""
        return self.results["step_seconds"][name] / self.results["step_seconds"][ORDINARY.name]


def best_cells(results: dict[str, Any]) -> dict[str, list[Cell]]:
    """Of each arm, in the order of the runs, the cells at its best rate, one a seed.

    Args:
        results: of a task, as in its file.
    """
    cells: list[Cell] = list(results["cells"].values())
    rows: dict[str, list[Cell]] = {}
    for name in dict.fromkeys(cell["arm"] for cell in cells):
        tuned = [cell for cell in cells if cell["arm"] == name and cell["seed"] == cells[0]["seed"]]
        rate = min(tuned, key=comparable)["rate"]
        rows[name] = [cell for cell in cells if cell["arm"] == name and cell["rate"] == rate]
    return rows


def comparable(cell: Cell) -> float:
    """Loss on the tuning data; a training that diverged comes last."""
    return cell["tuning_loss"] if math.isfinite(cell["tuning_loss"]) else math.inf


def spread(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Mean and standard deviation over seeds, such as "2.911 ± 0.044"."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"
