"""What `make demo` shows: training with token-selective backward, from nothing to a checkpoint, and what it costs.

Makes the embedded default data if it is missing, trains `configs/tiny.json` on it, compares the evaluation loss with
that of a smoothed bigram model of the same tokens, and measures step time and peak memory of `all`, `checkpoint` and
`selective` on the trained model and a batch of the run. Exits with 1 if the bigram model is better.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = "configs/tiny.json"
REPEATS = 5


def run(*command: str) -> None:
    """Run a command of this repository as a person would, and stop where it stops."""
    print(f"\n$ {shlex.join(['python', *command])}", flush=True)
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(code)


def compare() -> bool:
    """Print the comparisons for the finished run; whether its loss is below the bigram model's."""
    import torch
    from bigram import bigram_loss
    from rich.console import Console
    from rich.table import Table
    from step_cost import ALL, CHECKPOINT, Arm, Case, measure_cases

    from framework.checkpoint import StoredFragments, find_step, load_weights
    from framework.config import load_config
    from framework.models import configured_model
    from framework.training.objective import draw_selection
    from framework.training.run_data import load_run_data

    config = load_config(CONFIG)
    directory = Path(config.run.output_dir)
    checkpoint = find_step(directory, None)
    if checkpoint.evaluation is None:
        print(f"the run was stopped after step {checkpoint.step}; make demo goes on from there")
        return True
    loss = checkpoint.evaluation["loss"]

    data = load_run_data(config, lambda line: None)
    model = configured_model(config, data.tokenizer)
    bigram = bigram_loss(data.train, data.eval, model.config.vocab_size)
    print(f"\nevaluation loss {loss:.3f} nats a token; smoothed bigram model of the same tokens {bigram:.3f}")

    load_weights(StoredFragments(checkpoint.path, "model"), model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader, _ = data.loaders()
    batch = loader.next_window()[0]
    selection = draw_selection(config, batch)
    share = selection.selected_tokens / batch.tokens
    arms = [ALL, CHECKPOINT, Arm("selective", share), Arm("selective", share, retain_linears=True)]
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    case = Case(model.to(device).train(), inputs, {share: selection}, arms)
    rows = measure_cases({model.config.num_hidden_layers: case}, arms, repeats=REPEATS, adapter=False)

    sequences, tokens = batch.inputs["input_ids"].shape
    title = f"one batch of {sequences} x {tokens} tokens, {share:.0%} of them labelled, on {device}"
    table = Table(title=title)
    table.add_column("policy", no_wrap=True)
    for column in ("step ms", "/ all", "peak MiB", "/ all"):
        table.add_column(column, justify="right")
    for row in rows:
        name = row.arm.policy + (" + retained linears" if row.arm.retain_linears else "")
        cells = (row.seconds * 1e3, row.time_ratio, row.peak_bytes / 2**20, row.peak_ratio)
        table.add_row(name, *(f"{cell:.{digits}f}" for cell, digits in zip(cells, (0, 2, 1, 2), strict=True)))
    Console(highlight=False).print(table)
    print(
        "time: median of interleaved steps, its ratio the median of the ratios within a round; "
        "peak: live tensor bytes above weights and optimizer state"
    )
    print(
        f"\nThe checkpoint is {checkpoint.path}. To go on:\n"
        f"  python launchers/export.py --run {config.run.output_dir} --output {config.run.output_dir}/export\n"
        f"  python launchers/train.py --config {CONFIG} --inspect-data 3\n"
        f"  python launchers/train.py --config configs/llama8b-lora.json --dry-run"
    )
    return loss < bigram


def main() -> int:
    """Everything in turn; 1 if the trained model is no better than its baseline."""
    os.chdir(ROOT)  # where the config's paths start
    run("tools/make_default_data.py", "--output", "data/default")
    run("launchers/train.py", "--config", CONFIG)
    if compare():
        return 0
    print("error: the trained model is not better than the bigram model", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
