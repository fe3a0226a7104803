"""The ledger's peaks of runs of 7 to 70 billion parameters beside those of simulated steps.

    python tools/check_simulation.py --output docs/simulation.md

Every case is simulated at its real size, all blocks and the first of all its ranks, in a process of its own. The laws
that the ledger is computed with come from small models; this records those that are not there yet.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABELLED_SHARE = 0.3
TOKENS = 4096
MICRO_BATCH = 2
GIB = 2**30

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192}
LLAMA_2_7B = _LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA_2_13B = LLAMA_2_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN_2_5_32B = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
MODELS = {
    "Llama-2-7B": LLAMA_2_7B,
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-2-13B": LLAMA_2_13B,
    "Qwen2.5-32B": QWEN_2_5_32B,
    "Llama-3-70B": LLAMA_3_70B,
}

TUNING: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"adapter": {"kind": "lora", "rank": 16, "alpha": 32}},
}
RETENTION: dict[str, dict[str, Any]] = {
    "all": {"retention": {"policy": "all"}},
    "checkpoint": {"retention": {"policy": "checkpoint"}},
    "selective": {"retention": {"policy": "selective"}, "selection": {"strategy": "supervised"}},
    "selective, linears": {
        "retention": {"policy": "selective", "retain_linears": True},
        "selection": {"strategy": "supervised"},
    },
}
ENGINES: dict[str, dict[str, Any]] = {
    "single": {"engine": "single"},
    "FSDP2": {"engine": "fsdp"},
    "FSDP2, offload": {"engine": "fsdp", "offload_optimizer": True, "offload_parameters": True},
    "ZeRO 1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO 2": {"engine": "deepspeed", "zero_stage": 2},
    "ZeRO 2, offload": {"engine": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
    "ZeRO 3": {"engine": "deepspeed", "zero_stage": 3},
}
PRECISION = {"single": "pure_bf16"}
"""Of engines; `fp32_master` with others."""


@dataclass(frozen=True)
class Case:
    """One row, by keys of `MODELS`, `TUNING`, `RETENTION` and `ENGINES`."""

    model: str
    tuning: str
    retention: str
    engine: str = "single"
    ranks: int = 1

    def config(self) -> dict[str, Any]:
        """Of the run, as JSON values; two micro-batches a step."""
        return {
            "run": {"output_dir": "unused"},
            "model": {"from_config": MODELS[self.model], "tokenizer": "unused"} | TUNING[self.tuning],
            "data": {"train": "unused", "sequence_length": TOKENS, "packing": True},
            "sharding": ENGINES[self.engine],
            "optimizer": {"learning_rate": 1e-4, "precision": PRECISION.get(self.engine, "fp32_master")},
            "training": {
                "max_steps": 2,
                "global_batch_size": 2 * MICRO_BATCH * self.ranks,
                "micro_batch_size": MICRO_BATCH,
            },
        } | RETENTION[self.retention]


CASES = [
    *(Case("Llama-2-7B", "full", retention) for retention in ("all", "checkpoint", "selective")),
    *(Case("Llama-2-7B", "LoRA", retention) for retention in ("checkpoint", "selective, linears")),
    *(Case("Llama-3-8B", "full", retention, "FSDP2", 8) for retention in ("all", "checkpoint", "selective, linears")),
    *(Case("Llama-2-13B", "full", retention, "FSDP2", 8) for retention in ("checkpoint", "selective, linears")),
    Case("Llama-2-13B", "LoRA", "checkpoint"),
    Case("Qwen2.5-32B", "LoRA", "checkpoint"),
    Case("Qwen2.5-32B", "full", "selective", "FSDP2", 16),
    Case("Llama-3-70B", "LoRA", "selective, linears", "FSDP2", 8),
    Case("Llama-3-70B", "full", "checkpoint", "FSDP2", 64),
    Case("Llama-2-13B", "full", "checkpoint", "FSDP2, offload", 8),
    Case("Llama-2-7B", "full", "checkpoint", "ZeRO 1", 8),
    Case("Llama-3-8B", "full", "selective, linears", "ZeRO 2", 8),
    Case("Llama-2-13B", "full", "checkpoint", "ZeRO 2, offload", 8),
    Case("Llama-2-13B", "full", "selective", "ZeRO 3", 8),
    Case("Qwen2.5-32B", "LoRA", "checkpoint", "ZeRO 3", 8),
]


@dataclass(frozen=True)
class Row:
    """Bytes of the ledger's peak and of the simulated one, its phase; of the simulation seconds and resident bytes."""

    predicted: int
    simulated: int
    phase: str
    seconds: float
    resident: int

    @property
    def difference(self) -> float:
        """Of the ledger, relative to the simulation."""
        return self.predicted / self.simulated - 1


def measure(case: Case) -> Row:
    """One row; in a process of its own."""
    from framework.config import Config
    from framework.planner.choice import Choice
    from framework.planner.planning import PlannedJob
    from framework.planner.simulation import simulate
    from framework.planner.space import candidates

    config = Config.model_validate(case.config())
    found = simulate(config, case.ranks, LABELLED_SHARE)
    # KiB on Linux.
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job = PlannedJob(config, LABELLED_SHARE, lambda line: None)
    job.known(candidates(config, ranks=case.ranks, nodes=1, labelled_share=LABELLED_SHARE))
    ledger = job.memory(Choice.of(config, case.ranks, LABELLED_SHARE))
    phase = max(found.peaks, key=found.peaks.__getitem__)
    return Row(ledger.peak, found.peak, phase, found.seconds, resident)


def rows(cases: Sequence[Case], jobs: int) -> Iterator[tuple[Case, Row]]:
    """The rows of cases in their order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as processes:
        yield from zip(cases, processes.map(measure, cases), strict=True)


def line(case: Case, row: Row) -> str:
    """One line of the table."""
    cells = [
        *(case.model, case.tuning, case.retention, case.engine, str(case.ranks)),
        f"{row.predicted / GIB:.2f}",
        f"{row.simulated / GIB:.2f}",
        f"{row.difference:+.2%}",
        row.phase,
        f"{row.seconds:.0f}",
        f"{row.resident / GIB:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = f"""# The ledger beside simulated steps

Written by `COMMAND`. GiB of the first rank's peak: what the ledger predicts, from laws recorded with small models, and
what a step of the run itself allocates, simulated at its real size with all blocks. {TOKENS} packed tokens a row,
{MICRO_BATCH} rows a micro-batch, two micro-batches a step; {LABELLED_SHARE:.0%} of the tokens are labelled, and
selective blocks select these. One process trains in `pure_bf16`, several in `fp32_master`. The last columns are of the
simulation: seconds, on the machine that wrote this, and the most memory that its process had.

| model | tuning | retention | engine | ranks | ledger | simulated | difference | highest in | seconds | GiB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Measure and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, help="Markdown file; without it, print")
    options.add_argument("--model", choices=MODELS, help="only its cases")
    options.add_argument("--jobs", type=int, default=1, help="cases at a time")
    arguments = options.parse_args()
    cases = [case for case in CASES if arguments.model in (None, case.model)]
    lines, worst = [], 0.0
    for case, row in rows(cases, arguments.jobs):
        lines.append(line(case, row))
        worst = max(worst, abs(row.difference))
        print(lines[-1], flush=True)
    print(f"largest difference: {worst:.2%}")
    if arguments.output is not None:
        command = f"python tools/check_simulation.py --output {arguments.output}"
        text = HEAD.replace("COMMAND", command) + "\n".join(lines) + f"\n\nThe largest difference is {worst:.2%}.\n"
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
