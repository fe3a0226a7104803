"""What the planner chooses as the memory of each GPU falls, for two jobs, as a table in Markdown.

python tools/plan_budgets.py --simulate --output docs/budgets.md

Only the budget falls: rates stay those of one device. It also checks what has to hold, and exits 1 where it does not:
as the budget falls, neither class nor ratio of the gradient rises while some plan within the slowdown bound fits; just
below the least budget of every plan, found by bisection, that plan does not fit; some plan is exact, and the ratio of
some plan lies between the labelled share and 1. With `--simulate`, a step of every chosen plan is simulated at its real
size, and what that takes has to fit as well. Laws that this machine has not recorded are recorded first, which takes
some minutes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from framework.cli import run_command
from framework.config import Config
from framework.planner.checks import simulated_peaks
from framework.planner.choice import FIDELITIES, Choice
from framework.planner.hardware import cluster_of
from framework.planner.overrides import overrides, with_overrides
from framework.planner.planning import PlannedJob, budget_of
from framework.planner.profile import assumed_profile
from framework.planner.report import GIB, retention_words, sharding_words
from framework.planner.search import Budget, Found, Point, search

LABELLED_SHARE = 0.5
DEVICE = "H100"
BUDGETS = (80, 72, 64, 56, 48, 44, 40, 36, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8)
"""GiB of each GPU."""

LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}

LLAMA_2_13B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""All that `configs/llama13b.json` says, so that both have the same laws."""

LORA = {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"}

JOBS: dict[str, dict[str, Any]] = {
    "Llama-3-8B, LoRA of rank 16 on all linear layers, pure_bf16, 32 sequences of 8192 tokens, one GPU": {
        "model": {"from_config": LLAMA_3_8B, "tokenizer": "unused", "adapter": LORA},
        "data": {"train": "unused", "sequence_length": 8192},
        "optimizer": {"learning_rate": 2e-4, "precision": "pure_bf16"},
        "training": {"max_steps": 1, "global_batch_size": 32, "micro_batch_size": "auto"},
        "sharding": {"engine": "auto", "zero_stage": "auto"},
        "hardware": {"gpus_per_node": 1},
    },
    "Llama-2-13B, all parameters, fp32_master, 64 sequences of 4096 tokens, 8 GPUs": {
        "model": {"from_config": LLAMA_2_13B, "tokenizer": "unused"},
        "data": {"train": "unused", "sequence_length": 4096},
        "optimizer": {"learning_rate": 1e-5, "precision": "fp32_master"},
        "training": {"max_steps": 1, "global_batch_size": 64, "micro_batch_size": "auto"},
        "sharding": {"engine": "auto", "zero_stage": "auto"},
        "hardware": {"gpus_per_node": 8},
    },
}

Search = Callable[[int], Found]
"""Finds the plans within a budget in bytes."""


@dataclass(frozen=True)
class Row:
    """What is chosen within a budget.

    Attributes:
        budget: bytes.
        found: by the search.
        least: the least budget in bytes within which the same plan is chosen; None where none fits.
    """

    budget: int
    found: Found
    least: int | None

    @property
    def chosen(self) -> Point | None:
        """The plan; None where none fits."""
        return self.found.points[0] if self.found.points else None


def rows_of(find: Search, budgets: Sequence[int]) -> list[Row]:
    """The plans within falling budgets, and the least budget of each."""
    rows = []
    for budget in budgets:
        found = find(budget)
        rows.append(Row(budget, found, _least(find, found.points[0], budget) if found.points else None))
    return rows


def _least(find: Search, point: Point, budget: int) -> int:
    """The least budget within which a plan is chosen, by bisection."""
    low, high = 0, budget
    while high - low > 1:
        middle = (low + high) // 2
        points = find(middle).points
        if points and points[0].choice == point.choice:
            high = middle
        else:
            low = middle
    return high


def broken(rows: Sequence[Row], holds: Callable[[Point, int], bool], labelled_share: float) -> Iterator[str]:
    """What does not hold of the rows of a job.

    Args:
        rows: the largest budget first.
        holds: whether a plan stays within a budget in bytes.
        labelled_share: labelled tokens / all tokens.
    """
    within = [row for row in rows if row.chosen is not None and row.found.within_bound]
    for richer, poorer in pairwise(within):
        before, after = richer.found.points[0].choice, poorer.found.points[0].choice
        classes = [FIDELITIES.index(choice.fidelity(labelled_share)) for choice in (before, after)]
        if classes[1] < classes[0] or after.ratio > before.ratio:
            yield f"{poorer.budget / GIB:.1f} GiB have a more faithful plan than {richer.budget / GIB:.1f} GiB"
    if within and rows.index(within[-1]) != len(within) - 1:
        yield "a plan within the bound fits where with more memory none did"
    for row in rows:
        if row.chosen is not None and row.least is not None:
            if not holds(row.chosen, row.least) or holds(row.chosen, row.least - 1):
                yield f"the plan of {row.budget / GIB:.1f} GiB is given up while it fits"


def unfit(
    rows: Sequence[Row], simulated: Mapping[Choice, int], demand: Callable[[int], int], tensors: Callable[[Point], int]
) -> Iterator[str]:
    """What does not fit by simulation.

    Args:
        rows: of a job.
        simulated: bytes of tensors at the peak of each chosen plan.
        demand: of a number of allocated bytes, those that count against the budget.
        tensors: what of a plan's allocated bytes a simulation sees.
    """
    for row in rows:
        if row.chosen is not None:
            unseen = row.chosen.ledger.peak - tensors(row.chosen)
            needed = demand(simulated[row.chosen.choice] + unseen)
            if needed > row.budget:
                yield f"the plan of {row.budget / GIB:.1f} GiB takes {needed / GIB:.2f} GiB by simulation"


def not_shown(rows: Sequence[Row], labelled_share: float) -> Iterator[str]:
    """What no row of any job is an example of."""
    choices = [row.chosen.choice for row in rows if row.chosen is not None]
    if not any(choice.fidelity(labelled_share) == "exact" for choice in choices):
        yield "no plan is exact"
    if not any(labelled_share < choice.ratio < 1 for choice in choices):
        yield "no ratio lies between the labelled share and 1"


def table(rows: Sequence[Row], labelled_share: float, simulated: Mapping[Choice, int]) -> Iterator[str]:
    """The rows in Markdown, with what was simulated."""
    yield (
        "| GiB | class | ratio | sharding | retention | micro-batch | peak, GiB | tensors by simulation, GiB "
        "| slowdown | chosen down to, GiB |"
    )
    yield "| ---: | --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: |"
    for row in rows:
        if row.chosen is None or row.least is None:
            yield f"| {row.budget / GIB:g} | nothing fits | | | | | | | | |"
            continue
        choice = row.chosen.choice
        seen = f"{simulated[choice] / GIB:.2f}" if choice in simulated else ""
        slowdown = f"{row.found.slowdown(row.chosen):.2f}" + ("" if row.found.within_bound else " (over the bound)")
        yield (
            f"| {row.budget / GIB:g} | {choice.fidelity(labelled_share)} | {choice.ratio:.4f} "
            f"| {sharding_words(choice)} | {retention_words(choice)} "
            f"| {choice.micro_batch_size} x {choice.accumulation} | {row.chosen.ledger.peak / GIB:.2f} "
            f"| {seen} | {slowdown} | {row.least / GIB:.2f} |"
        )


class PlannedBudgets:
    """A job of `JOBS`, planned within every budget.

    Attributes:
        rows: one for each budget.
        holds: whether a plan stays within a budget.
        simulated: of each chosen plan the bytes of tensors at the peak of a simulated step, once `simulate` was called.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        shared = {
            "run": {"output_dir": "unused"},
            "selection": {"strategy": "supervised", "ratio": "auto"},
            "retention": {"policy": "auto"},
            "planner": {"top": 1},
        }
        self._config = config = Config.model_validate(shared | settings)
        job = PlannedJob(config, LABELLED_SHARE, lambda line: print(line, file=sys.stderr))
        cluster = cluster_of(config.hardware, assumed_profile, device=DEVICE)
        self._profile = profile = assumed_profile(cluster.device)
        space, laws = job.known(job.space(cluster.ranks, cluster.nodes)), job.laws(cluster, profile)

        def within(budget: int) -> Budget:
            return budget_of(replace(cluster, budget_bytes=budget), profile)

        def find(budget: int) -> Found:
            return search(space, laws, within(budget), config.planner, labelled_share=LABELLED_SHARE)

        self.rows = rows_of(find, [size * GIB for size in BUDGETS])
        self.holds: Callable[[Point, int], bool] = lambda point, budget: within(budget).holds(point.ledger)
        self.simulated: dict[Choice, int] = {}

    def simulate(self) -> None:
        """Simulate a step of every chosen plan."""
        choices = list(dict.fromkeys(row.chosen.choice for row in self.rows if row.chosen is not None))
        for number, choice in enumerate(choices, start=1):
            values = overrides(self._config, choice, LABELLED_SHARE)
            config = with_overrides(self._config, values)
            assert config is not None
            ((peaks, seconds),) = simulated_peaks([(config, choice.ranks)], LABELLED_SHARE)
            self.simulated[choice] = max(peaks.values())
            print(f"simulated {number} of {len(choices)} plans in {seconds:.0f} s", file=sys.stderr)

    def problems(self) -> Iterator[str]:
        """What does not hold."""
        yield from broken(self.rows, self.holds, LABELLED_SHARE)
        if self.simulated:
            ratio = self._profile.reserved_ratio
            yield from unfit(
                self.rows, self.simulated, lambda size: round(size * ratio), lambda point: point.ledger.tensors
            )


def main() -> int:
    """Plan, check and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, metavar="FILE", help="write the table there instead of printing it")
    options.add_argument("--simulate", action="store_true", help="simulate a step of every chosen plan, too")
    arguments = options.parse_args()
    command = f"python tools/plan_budgets.py {shlex.join(sys.argv[1:])}".strip()
    lines = [
        "# Plans by budget",
        "",
        f"Written by `{command}`. The budget is what the allocator may reserve on each GPU, with {DEVICE} rates; "
        f"{LABELLED_SHARE:.0%} of the tokens are labelled. The objective is `balanced`, with `planner.max_slowdown` "
        "1.5. The slowdown is to the fastest permitted plan with unlimited memory. What a plan needs of the budget is "
        "its peak and the fragmentation that is assumed beside it. A simulation sees tensors, and no workspaces of "
        "cuBLAS.",
    ]
    every: list[Row] = []
    problems: list[str] = []
    for name, settings in JOBS.items():
        job = PlannedBudgets(settings)
        if arguments.simulate:
            job.simulate()
        every += job.rows
        problems += [f"{name}: {problem}" for problem in job.problems()]
        lines += ["", f"## {name}", "", *table(job.rows, LABELLED_SHARE, job.simulated)]
    problems += not_shown(every, LABELLED_SHARE)
    text = "\n".join(lines) + "\n"
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    for problem in problems:
        print(f"does not hold: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
