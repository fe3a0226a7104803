"""Step time and tensor bytes of the retention policies, as ratios measured in one run.

    python tools/bench_step.py                                  # a small grouped-query model on CPU
    python tools/bench_step.py --model CONFIG.json --device cuda --dtype bfloat16 --depths 4 8
    python tools/bench_step.py --config configs/llama8b-lora.json --depths 1 2
    python tools/bench_step.py --hybrid --answers --strategies uniform suffix    # linear attention, recomputed or not

`step_cost.py` says what is measured and how.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step_cost import Arm, Case, Row, default_arms, measure_cases
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from framework.retention import KV_FORMATS
from framework.selection import Selection, select

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def draw_batch(
    *, batch: int, sequence: int, vocabulary: int, ratios: Sequence[float], answers: bool, device: torch.device
) -> tuple[dict[str, Tensor], dict[float, Selection]]:
    """A random batch and its selections.

    Args:
        batch: sequences.
        sequence: tokens of each.
        vocabulary: token ids are drawn below it.
        ratios: a selection for each.
        answers: label the last smallest-ratio share of each sequence and select the last tokens; else label all
            tokens and select uniformly.
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, sequence), generator=generator)
    labels = ids.clone()
    if answers:
        labels[:, : sequence - round(min(ratios) * sequence)] = -100
    documents = torch.arange(batch)[:, None].expand(batch, sequence)
    selections = {}
    for ratio in ratios:
        if answers:
            selected = max(1, round(ratio * sequence))
            # One earlier: the token before the answer predicts its first token, and the last predicts none.
            positions = torch.arange(sequence - 1 - selected, sequence - 1).clamp(min=0).unique()
            selections[ratio] = Selection.of_positions(positions.expand(batch, -1).to(device))
        else:
            supervised = torch.ones(batch, sequence, dtype=torch.bool)
            supervised[:, -1] = False
            selections[ratio] = select(
                strategy="uniform", ratio=ratio, supervised=supervised, documents=documents, seed=0
            )
    return {"input_ids": ids.to(device), "labels": labels.to(device)}, selections


def build_model(
    config: dict[str, Any],
    *,
    depth: int,
    dtype: torch.dtype,
    device: torch.device,
    adapter_rank: int = 0,
    seed: int = 0,
) -> torch.nn.Module:
    """A randomly initialised causal model in train mode.

    Args:
        config: a Hugging Face config with `model_type`.
        depth: blocks, in place of the config's; per-layer lists are repeated or cut.
        dtype: of the weights; an adapter's are float32, as PEFT makes them.
        device: where to build it.
        adapter_rank: rank of LoRA on all linears; 0 trains all weights.
        seed: of the weights.
    """
    options = {key: value for key, value in config.items() if key != "model_type"}
    if "layer_types" in options:
        kinds = options["layer_types"]
        options |= {"layer_types": [kinds[i % len(kinds)] for i in range(depth)], "num_hidden_layers": depth}
    hf_config = CONFIG_MAPPING[config["model_type"]](**options)
    hf_config.num_hidden_layers = depth
    hf_config.use_cache = False
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    if adapter_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=adapter_rank, lora_alpha=2 * adapter_rank, target_modules="all-linear")
        model = get_peft_model(model, lora)
    return model.to(device).train()


def measure(
    config: dict[str, Any],
    *,
    depths: Sequence[int],
    batch: int,
    sequence: int,
    arms: Sequence[Arm],
    repeats: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    adapter_rank: int = 0,
    answers: bool = False,
) -> list[Row]:
    """Build the model at each depth and measure all arms on one random batch.

    Args:
        config: a Hugging Face config with `model_type`.
        depths: numbers of blocks, ascending.
        batch: sequences in the batch.
        sequence: tokens of each.
        arms: rows of the result, at each depth.
        repeats: timed rounds.
        dtype: of the weights.
        device: a torch device.
        adapter_rank: rank of LoRA on all linears; 0 trains all weights.
        answers: see `draw_batch`.
    """
    ratios = sorted({arm.ratio for arm in arms if arm.policy == "selective"})
    place = torch.device(device)
    cases = {}
    for depth in depths:
        model = build_model(config, depth=depth, dtype=dtype, device=place, adapter_rank=adapter_rank)
        vocabulary = model.config.vocab_size
        drawn = draw_batch(
            batch=batch, sequence=sequence, vocabulary=vocabulary, ratios=ratios, answers=answers, device=place
        )
        cases[depth] = Case(model, *drawn, arms)
    return measure_cases(cases, arms, repeats=repeats, adapter=adapter_rank > 0)


def table(rows: Sequence[Row], title: str) -> Table:
    """Measured ratios beside ideal ones: of the blocks' matrices, and counted with attention and head."""
    result = Table(title=title)
    result.add_column("blocks", justify="right")
    result.add_column("arm", no_wrap=True)
    for column in (
        "step s", "time / all", "ideal", "counted", "peak MiB", "peak / all", "kept MiB", "kept / checkpoint",
        "kept a block MiB", "/ checkpoint", "kept outside MiB",
    ):  # fmt: skip
        result.add_column(column, justify="right")
    depths = {row.depth for row in rows}
    for number, row in enumerate(rows):
        mebibytes = [
            None if value is None else value / 2**20 for value in (row.block_kept_bytes, row.outside_kept_bytes)
        ]
        result.add_row(
            str(row.depth),
            row.name,
            f"{row.seconds:.3f}",
            f"{row.time_ratio:.3f}",
            f"{row.ideal_time_ratio:.3f}",
            f"{row.counted_time_ratio:.3f}",
            f"{row.peak_bytes / 2**20:.1f}",
            f"{row.peak_ratio:.3f}",
            f"{row.kept_bytes / 2**20:.2f}",
            f"{row.kept_ratio:.3f}",
            *("-" if value is None else f"{value:.3f}" for value in (mebibytes[0], row.block_kept_ratio, mebibytes[1])),
            end_section=(number + 1) % (len(rows) // len(depths)) == 0,
        )
    return result


def read_run_config(path: str) -> dict[str, Any]:
    """What a run's config says about the step: options of `measure`, by name."""
    from framework.config import load_config

    config = load_config(path)
    if config.model.from_config is None:
        raise SystemExit(f"error: {path}: model.from_config is needed, so that no weights are read")
    return {
        "config": config.model.from_config,
        "batch": config.training.micro_batch_size,
        "sequence": config.data.sequence_length,
        "dtype": DTYPES[config.weights_dtype],
        "adapter_rank": 0 if config.model.adapter is None else config.model.adapter.rank,
    }


def hybrid(hidden: int, heads: int) -> dict[str, Any]:
    """What a Qwen3-Next-like model has in place of a Llama-like one's: gated delta nets with heads as Qwen has them."""
    size = hidden // heads
    return {
        "model_type": "qwen3_next",
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "head_dim": size,
        "num_experts": 0,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": 2 * heads,
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run's config: model, batch, sequence, dtype and adapter come from it")
    parser.add_argument("--model", help="a Hugging Face config.json, instead of the built-in Llama-like model")
    for name, value in {"hidden": 768, "heads": 12, "kv-heads": 4, "intermediate": 2048, "vocabulary": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the built-in model (default {value})")
    parser.add_argument(
        "--hybrid", action="store_true", help="three of four blocks of it with linear attention (Qwen3-Next)"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8], help="numbers of blocks")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of each")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.25], help="of the selective arms")
    parser.add_argument("--kv-formats", nargs="+", default=["model", "int8"], choices=KV_FORMATS)
    parser.add_argument("--answers", action="store_true", help="select a labelled end instead of uniform positions")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["uniform"],
        choices=["uniform", "suffix"],
        help="of the selective arms: whether the selection is known to be contiguous, which --answers makes it",
    )
    parser.add_argument("--compile", action="store_true", help="measure every arm with compiled blocks, too")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds over all arms")
    parser.add_argument("--adapter", type=int, default=0, metavar="RANK", help="LoRA of this rank on all linears")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    options: dict[str, Any] = {
        "batch": args.batch,
        "sequence": args.sequence,
        "dtype": DTYPES[args.dtype],
        "adapter_rank": args.adapter,
    }
    if args.config:
        options = read_run_config(args.config)
    elif args.model:
        options["config"] = json.loads(Path(args.model).read_text())
    else:
        options["config"] = {
            "model_type": "llama",
            "hidden_size": args.hidden,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "intermediate_size": args.intermediate,
            "vocab_size": args.vocabulary,
            "max_position_embeddings": args.sequence,
        }
        if args.hybrid:
            options["config"] |= hybrid(args.hidden, args.heads)
    rows = measure(
        **options,
        depths=sorted(args.depths),
        arms=default_arms(args.ratios, args.kv_formats, args.strategies, compile=args.compile),
        repeats=args.repeats,
        device=args.device,
        answers=args.answers,
    )
    tokens = f"{options['batch']} x {options['sequence']} tokens"
    kind = f"LoRA rank {options['adapter_rank']}" if options["adapter_rank"] else "full fine-tuning"
    title = f"{options['config']['model_type']}, {tokens}, {kind}, {options['dtype']}, {args.device}"
    Console(width=190).print(table(rows, title))
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
