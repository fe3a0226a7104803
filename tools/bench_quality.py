"""What token selection is worth: losses and skills after the same measured time.

    python tools/bench_quality.py --task text --output runs/quality
    python tools/bench_quality.py --task retrieval --output runs/quality
    python tools/bench_quality.py --task transfer --output runs/quality
    python tools/bench_quality.py --task text --output runs/quality --report     # print what is there
    python tools/bench_quality.py --output runs/quality --plot docs/quality.png  # draw what is there, of all tasks

`text`: a small model is trained on one kind of text, once per seed; from there every arm trains on another kind,
instruction pairs with labels on the answers, and the loss of held-out pairs is reported. `retrieval`: pairs of keys and
values, filler of several lengths, then keys whose values are asked; labels on the values alone, random weights at the
start. `transfer`: the same from a start that retrieves over a short gap, with longer gaps and, of four, two new keys.

Every arm trains for the same time: its number of steps is the budget divided by its median step time, measured before,
all arms in turn. So noise of the machine during the training changes nothing. Every arm has its own learning rate, the
best on held-out data with the first seed; if it is the smallest or largest tried, the next one is tried, too. Each
finished cell is saved in a file of the task, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quality_bench import Bench
from quality_plots import draw
from quality_retrieval import KEYS
from quality_skill import SkillBench
from quality_text import TextBench

RETRIEVAL: dict[str, Any] = {
    "hidden": 64,
    "depth": 2,
    "batch": 12,
    "sequence": 192,
    "start_rate": 3e-3,
    "rates": [3e-3, 5e-3],
    "most_rates": 2,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {
        "hidden": 256,
        "depth": 4,
        "batch": 8,
        "sequence": 512,
        "start_steps": 120,
        "start_rate": 2e-3,
        "ordinary_steps": 55,
        "rates": [1e-3, 2e-3, 4e-3],
        "most_rates": 4,
    },
    "retrieval": RETRIEVAL | {"start_steps": 0, "ordinary_steps": 400, "gaps": [8, 32, 128]},
    "transfer": RETRIEVAL | {"start_steps": 200, "ordinary_steps": 120, "rates": [1e-3, 2e-3], "gaps": [32, 128]},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what it leaves open is the task's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(DEFAULTS), default="text")
    parser.add_argument("--output", type=Path, required=True, help="folder of results and starting points")
    parser.add_argument("--data", type=Path, default=Path("data/default"), help="from tools/make_default_data.py")
    parser.add_argument("--report", action="store_true", help="print the table of what is done, train nothing")
    parser.add_argument("--plot", type=Path, help="draw what is done of all tasks into this file, train nothing")
    parser.add_argument("--arms", nargs="+", help="names of those to train besides `ordinary`; all by default")
    parser.add_argument("--hidden", type=int, help="width of the model, a multiple of 32")
    parser.add_argument("--depth", type=int, help="blocks of the model")
    parser.add_argument("--batch", type=int, help="sequences of a whole step")
    parser.add_argument("--sequence", type=int, help="tokens of a packed sequence")
    parser.add_argument("--gaps", type=int, nargs="+", help="tokens of filler, of the retrieval tasks")
    parser.add_argument("--start-gap", type=int, default=8, help="tokens of filler of the start of `transfer`")
    parser.add_argument("--keys", choices=list(KEYS), default="half", help="of `transfer`, beside its start's")
    parser.add_argument("--documents", type=int, default=10_000, help="training documents of each gap")
    parser.add_argument("--start-steps", type=int, help="steps to the starting point")
    parser.add_argument("--start-rate", type=float, help="learning rate of the starting point")
    parser.add_argument("--ordinary-steps", type=int, help="steps of the ordinary arm: the time budget")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to try")
    parser.add_argument("--most-rates", type=int, help="an arm tries at most so many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each arm")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the table."""
    args = parse(arguments)
    if args.plot is not None:
        draw(args.output, args.plot)
        return
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    bench: Bench = TextBench(args) if args.task == "text" else SkillBench(args, args.task)
    if not args.report:
        bench.run()
    print(bench.report())


if __name__ == "__main__":
    main()
