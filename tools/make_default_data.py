"""Make the embedded default: an instruction data set of documentation strings, and a tokenizer trained on it.

    python tools/make_default_data.py --output data/default

The text comes from the source files of the packages that are installed anyway and of the standard library; nothing is
downloaded or imported. Two tasks: `describe`, signature -> description, and `signature`, documentation -> signature, a
short answer after a long prompt. Their mixture is chosen so that a quarter of all tokens are answers. With the same
packages installed, the same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from docstrings import Definition, find_definitions, stable_hash
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from framework.data import TokenizedDataset

RECIPE = 2
"""Changes when this program would write something else for the same arguments."""

VOCABULARY = 512
"""Small, so that a model of a million parameters has little to learn by heart and much to predict."""
TRAINING_CHARACTERS = 6_000_000
"""Text that the tokenizer is trained on; more changes little and takes longer."""
LABELLED_SHARE = 0.25
BALANCED_LENGTH = 512
"""The share is right for runs of this sequence length, which drop what is longer; longer pairs have relatively short
answers, so the share of the whole is somewhat lower, and that of shorter runs higher."""
EVALUATION_SHARE = 0.04
SAMPLE = 2000
"""Pairs that are measured to choose the mixture, and texts that are checked for their round trip."""
FOUND_PER_PAIR = 1.6
"""Documented definitions that are looked at for each pair that is wanted: a third of them is no use."""
THREADS = 2
QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
SEQUENCE_LENGTHS = (256, 512, 1024)
"""Lengths whose labelled share the summary states: what is longer is dropped, so the share depends on it."""

DESCRIBE, SIGNATURE = "describe", "signature"


def as_messages(definition: Definition, task: str) -> list[dict[str, str]]:
    """The question and answer of one pair."""
    kind = "class" if definition.signature.startswith("class ") else "function"
    if task == DESCRIBE:
        question = f"Describe this {kind} of {definition.place}.\n\n{definition.signature}"
        answer = definition.description
    else:
        question = f"Give the signature of the {kind} of {definition.place} with this documentation.\n\n"
        question += definition.documentation
        answer = definition.signature
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _training_texts(definitions: Iterable[Definition]) -> Iterable[str]:
    """Both sides of pairs until there is enough; long documentation does not get more weight than its share."""
    total = 0
    for definition in definitions:
        question, answer = as_messages(definition, SIGNATURE)
        text = f"{question['content']}\n{answer['content']}"
        yield text
        total += len(text)
        if total > TRAINING_CHARACTERS:
            return


def assign_tasks(definitions: Sequence[Definition], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[str]:
    """A task for each definition, such that about `LABELLED_SHARE` of the tokens of a run are answers.

    Descriptions are long answers to short questions, signatures the reverse; so many definitions that have a
    description are asked for it that the two balance.
    """
    describable = [index for index, each in enumerate(definitions) if each.has_description]
    describable.sort(key=lambda index: stable_hash(definitions[index].signature, seed))
    of_signatures = _surplus([as_messages(each, SIGNATURE) for each in definitions[:SAMPLE]], tokenizer)
    of_descriptions = _surplus([as_messages(definitions[i], DESCRIBE) for i in describable[:SAMPLE]], tokenizer)
    wanted = len(definitions) * of_signatures / (of_signatures - of_descriptions)
    described = set(describable[: max(0, round(wanted))])
    return [DESCRIBE if index in described else SIGNATURE for index in range(len(definitions))]


def _surplus(pairs: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean number of labelled tokens that a pair has above its `LABELLED_SHARE`; long pairs count as nothing."""
    encoded = tokenizer.apply_chat_template(list(pairs), return_assistant_tokens_mask=True)
    masks = encoded["assistant_masks"]
    return float(np.mean([(sum(mask) - LABELLED_SHARE * len(mask)) * (len(mask) <= BALANCED_LENGTH) for mask in masks]))


def check_round_trip(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if a text is not what its tokens say, to the last blank."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for text, decoded in zip(texts, tokenizer.batch_decode(encoded), strict=True):
        if text != decoded:
            start = next(place for place, (a, b) in enumerate(zip_longest(text, decoded)) if a != b)
            wanted, got = text[start : start + 20], decoded[start : start + 20]
            raise RuntimeError(f"the tokenizer gives back {got!r} for {wanted!r}")


def make(output: Path, *, pairs: int, seed: int) -> dict[str, Any]:
    """Write `train.jsonl`, `eval.jsonl` and `tokenizer/` into the empty directory `output`; returns a summary."""
    # Imported here because they take seconds, and mostly the data is there already.
    from chat_tokenizer import save_tokenizer, train_sentencepiece

    from framework.data import load_dataset

    definitions = find_definitions(round(pairs * FOUND_PER_PAIR), workers=THREADS)
    definitions.sort(key=lambda each: stable_hash(each.place + each.signature, seed))
    del definitions[pairs:]
    model = train_sentencepiece(_training_texts(definitions), vocabulary=VOCABULARY, threads=THREADS)
    tokenizer = save_tokenizer(model, output / "tokenizer")
    check_round_trip([each.documentation for each in definitions[:SAMPLE]], tokenizer)
    tasks = assign_tasks(definitions, tokenizer, seed)
    # No two definitions are of one family, so nothing in one file is nearly a copy of something in the other.
    held_out = [stable_hash(each.family, seed) / 2**64 < EVALUATION_SHARE for each in definitions]
    summary: dict[str, Any] = {}
    for name, wanted in (("train", False), ("eval", True)):
        chosen = [
            pair for pair, held in zip(zip(definitions, tasks, strict=True), held_out, strict=True) if held == wanted
        ]
        file = output / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            for definition, task in chosen:
                record = {"messages": as_messages(definition, task), "task": task, "place": definition.place}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        # Read back as a training run will, which checks the files too.
        dataset = load_dataset(file, tokenizer=tokenizer, sequence_length=1 << 20)
        summary[name] = _statistics(dataset, [task for _, task in chosen])
    return summary


def _statistics(dataset: TokenizedDataset, tasks: Sequence[str]) -> dict[str, Any]:
    """Counts, shares and length quantiles of a file, by task and by the sequence length of a run."""
    lengths = dataset.lengths
    labelled = np.add.reduceat(dataset.supervised, dataset.offsets[:-1], dtype=np.int64)

    def part(mask: np.ndarray) -> dict[str, Any]:
        return {
            "pairs": int(mask.sum()),
            "tokens": int(lengths[mask].sum()),
            "labelled_share": round(float(labelled[mask].sum() / max(1, lengths[mask].sum())), 4),
        }

    groups = {
        "all": np.ones(len(dataset), bool),
        **{task: np.array(tasks) == task for task in (DESCRIBE, SIGNATURE)},
        **{f"<= {length}": lengths <= length for length in SEQUENCE_LENGTHS},
    }
    return {
        name: {**part(mask), "lengths": np.quantile(lengths[mask], list(QUANTILES.values())).astype(int).tolist()}
        for name, mask in groups.items()
        if mask.any()
    }


def print_summary(summary: dict[str, Any]) -> None:
    """A table of what `make` returned."""
    table = Table("file", "pairs", box=SIMPLE, title="Pairs by task and by length, with quantiles of the length")
    for heading in ("count", "tokens", "labelled", *QUANTILES):
        table.add_column(heading, justify="right")
    for file, groups in summary.items():
        for name, row in groups.items():
            table.add_row(
                file,
                name,
                f"{row['pairs']:,}",
                f"{row['tokens'] / 1000:,.0f} k",
                f"{row['labelled_share']:.1%}",
                *(f"{length:,}" for length in row["lengths"]),
            )
        table.add_section()
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/default"), help="directory to write, or to replace")
    parser.add_argument("--pairs", type=int, default=24_000, help="pairs at most, evaluation included")
    parser.add_argument("--seed", type=int, default=0, help="of which pairs are taken and held out")
    options = parser.parse_args(arguments)
    if options.pairs < 1000:
        parser.error("--pairs: at least 1000, or there is too little text for the tokenizer")

    about = options.output / "about.json"
    made_with = {"recipe": RECIPE, "pairs": options.pairs, "seed": options.seed}
    if about.is_file() and json.loads(about.read_text())["made_with"] == made_with:
        print(f"{options.output} is there already, made with the same arguments")
        return 0
    if options.output.exists() and any(options.output.iterdir()) and not about.is_file():
        parser.error(f"--output: {options.output} holds something that this program did not make")

    started = time.monotonic()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there at the end, so that an interrupted run leaves nothing half made.
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".making-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        summary = make(made, pairs=options.pairs, seed=options.seed)
        (made / "about.json").write_text(json.dumps({"made_with": made_with, "summary": summary}, indent=1) + "\n")
        if options.output.exists():
            shutil.rmtree(options.output)
        made.rename(options.output)
    print_summary(summary)
    print(f"{options.output} made in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
