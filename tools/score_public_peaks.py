"""Published peaks of Hugging Face Trainer runs beside those of the planner's closed forms.

    python tools/score_public_peaks.py
    python tools/score_public_peaks.py --csv other_peaks.csv

The file has a row a run: `architecture` (as in `llama h=4096 m=11008 L=32 heads=32 kv=32 V=32000`), `tuning`, `kernels`
(`stock` or `fused`), `autocast_bf16`, `gpus`, `sequences_per_gpu`, `sequence_length`, and what was measured on a GPU:
`at_rest_bytes` and `peak_allocated_bytes`. `framework/planner/trainer_runs.py` says what is assumed of the runs.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from framework.errors import UserError
from framework.models.configuration import read_model_config
from framework.planner.ledger import Ledger
from framework.planner.shapes import Shapes, shapes_of
from framework.planner.trainer_runs import TrainerRun, ledger

PUBLISHED = Path(__file__).parents[1] / "tests" / "planner" / "data" / "public_peaks.csv"
TUNINGS = ("full", "lora", "qlora-nf4")
KERNELS = ("stock", "fused")
CONFIG_KEYS = {
    "h": "hidden_size",
    "m": "intermediate_size",
    "L": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv": "num_key_value_heads",
    "V": "vocab_size",
}
"""What the sizes in `architecture` are called in a Hugging Face config; others go by their own names."""
TIED = ("granite",)
"""Families whose published models have the embedding for a head (granite-3.0-8b-base), not as by default."""


@dataclass(frozen=True)
class Score:
    """A run and what is said of it.

    Attributes:
        row: of the file.
        predicted: the ledger of a GPU.
    """

    row: Mapping[str, str]
    predicted: Ledger

    @property
    def peak_error(self) -> float:
        """(Predicted - measured) / measured peak."""
        return self.predicted.peak / int(self.row["peak_allocated_bytes"]) - 1

    @property
    def rest_error(self) -> float:
        """The same of what is held between steps."""
        return self.predicted.total("save") / int(self.row["at_rest_bytes"]) - 1


def config_of(architecture: str) -> PreTrainedConfig:
    """The Hugging Face config of an `architecture`: the `model_type`, sizes as `key=value`, and `tied` for a tied head.

    Raises:
        UserError: it is no such text, or of no known family.
    """
    family, *sizes = architecture.split()
    values: dict[str, str | int] = {"model_type": family}
    if family in TIED:
        values["tie_word_embeddings"] = True
    for size in sizes:
        key, _, value = size.partition("=")
        if size == "tied":
            values["tie_word_embeddings"] = True
        elif value.isdecimal():
            values[CONFIG_KEYS.get(key, key)] = int(value)
        else:
            raise UserError(f"architecture: {size!r} is not as in h=4096")
    return read_model_config(None, values)


@functools.cache
def architecture_shapes(architecture: str) -> Shapes:
    """The sizes of an `architecture`."""
    return shapes_of(config_of(architecture))


def run_of(row: Mapping[str, str]) -> TrainerRun:
    """The run of a row.

    Raises:
        UserError: the row names what there is no closed form for.
    """
    tuning, kernels, autocast = row["tuning"], row["kernels"], row["autocast_bf16"]
    for column, value, known in (("tuning", tuning, TUNINGS), ("kernels", kernels, KERNELS)):
        if value not in known:
            raise UserError(f"{column}: {value!r} is none of {', '.join(known)}")
    if autocast not in ("yes", "no"):
        raise UserError(f"autocast_bf16: {autocast!r} is neither yes nor no")
    return TrainerRun(
        shapes=architecture_shapes(row["architecture"]),
        tuning=tuning,
        fused=kernels == "fused",
        autocast=autocast == "yes",
        gpus=int(row["gpus"]),
        sequences=int(row["sequences_per_gpu"]),
        length=int(row["sequence_length"]),
    )


def scores_of(path: Path) -> list[Score]:
    """A score for every row of a file.

    Raises:
        UserError: a row lacks a column or names what there is no closed form for; the message has its line.
    """
    scores = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                scores.append(Score(row, ledger(run_of(row))))
            except ValueError as error:
                raise UserError(f"{path}:{reader.line_num}: {error}") from error
            except KeyError as error:
                raise UserError(f"{path}: no column {error}") from error
    return scores


def table(scores: Sequence[Score]) -> Table:
    """A row for every run."""
    result = Table(title="predicted and measured, GiB a GPU")
    for column in ("model", "tuning", "kernels"):
        result.add_column(column, no_wrap=True)
    for column in ("GPUs", "rows", "at rest", "predicted", "error", "peak", "predicted", "error"):
        result.add_column(column, justify="right", no_wrap=True)
    result.add_column("binding phase", no_wrap=True)
    for score in scores:
        row, predicted = score.row, score.predicted
        result.add_row(
            row["model"].rpartition("/")[2],
            row["tuning"],
            row["kernels"],
            row["gpus"],
            row["sequences_per_gpu"],
            _gibibytes(int(row["at_rest_bytes"])),
            _gibibytes(predicted.total("save")),
            f"{score.rest_error:+.3%}",
            _gibibytes(int(row["peak_allocated_bytes"])),
            _gibibytes(predicted.peak),
            f"{score.peak_error:+.3%}",
            predicted.binding_phase,
        )
    return result


def summary(scores: Sequence[Score]) -> Table:
    """Medians and maxima of absolute errors by kernels."""
    result = Table(title="absolute errors")
    for column in ("kernels", "runs", "at rest, median", "most", "peak, median", "most"):
        result.add_column(column, justify="right")
    for kernels in KERNELS:
        chosen = [score for score in scores if score.row["kernels"] == kernels]
        if chosen:
            cells = [kernels, str(len(chosen))]
            for errors in ([s.rest_error for s in chosen], [s.peak_error for s in chosen]):
                found = [*map(abs, errors)]
                cells += [f"{statistics.median(found):.4%}", f"{max(found):.4%}"]
            result.add_row(*cells)
    return result


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=PUBLISHED, metavar="FILE", help="rows to score")
    options = parser.parse_args(arguments)
    try:
        scores = scores_of(options.csv)
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")
    console = Console()
    console.print(table(scores))
    console.print(summary(scores))


if __name__ == "__main__":
    main()
