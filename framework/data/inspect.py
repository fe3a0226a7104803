"""Showing samples: which tokens are learnt and which receive gradient, for people to look at before they train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from framework.data.batch import NO_DOCUMENT, Batch
from framework.data.dataset import IGNORED, Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from framework.selection import Selection

# (is to be learnt, is selected) -> style, and marks around the text that say the same in a log without colour.
APPEARANCE = {
    (False, False): ("dim", "", ""),
    (True, False): ("bold green", "⟦", "⟧"),
    (False, True): ("cyan underline", "⟪", "⟫"),
    (True, True): ("bold green underline", "⟦⟪", "⟫⟧"),
}


def show_samples(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    selection: Selection | None = None,
    *,
    console: Console | None = None,
    count: int | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Print the documents of a batch with their label mask and, if given, the selection.

    Labels are shown on the tokens that are to be learnt. The selection is shown on the positions that receive
    gradient; the loss of the token to be learnt at i + 1 arises at position i, so the two are one token apart.
    A classifier's samples are shown with their class, and the tokens that its head reads in place of those to be
    learnt. Padding is left out. In a log, where there are no colours, marks stand around the text.

    Args:
        batch: One micro-batch of `Loader` or `evaluation_batches`.
        tokenizer: The one that the batch was made with.
        selection: Of this batch, from `framework.selection.select`.
        console: Where to print; standard output by default.
        count: Documents to print; all by default.
        label_names: A classifier's classes.
    """
    console = console or Console()
    marked = console.color_system is None
    nothing = torch.zeros_like(batch.documents, dtype=torch.bool)
    chosen = nothing if selection is None else selection.mask(batch.documents.shape[1])
    learnt_meaning = "supervised (to be learnt)" if batch.pooled is None else "supervised (read by the classifier)"
    _print_legend(console, marked, selection is not None, learnt_meaning)
    shown = 0
    for row in range(batch.documents.shape[0]):
        documents = batch.documents[row]
        for draw in torch.unique_consecutive(documents[documents != NO_DOCUMENT]).tolist():
            if shown == count:
                return
            shown += 1
            places = (documents == draw).nonzero()[:, 0]
            header = f"row {row}, draw {draw}: {len(places)} tokens"
            if batch.pooled is None:
                learnt = batch.inputs["labels"][row, places] != IGNORED
                header += f", {int(learnt.sum())} supervised"
            else:
                learnt = batch.supervised[row, places]
                header += f", class {_class_name(batch, row, label_names)}"
            if selection is not None:
                header += f", {int(chosen[row, places].sum())} selected"
            console.rule(Text(header), align="left", style="none")
            body = _marked_up(batch.inputs["input_ids"][row, places], learnt, chosen[row, places], tokenizer, marked)
            # Not highlighted, or numbers and paths in the text would get colours of their own.
            console.print(body, soft_wrap=True, highlight=False)


def show_images(
    batch: Batch,
    dataset: Dataset,
    label_names: Sequence[str] | None,
    selection: Selection | None = None,
    *,
    console: Console,
    count: int,
) -> None:
    """Print the files of a batch of images with their classes and, if given, the selection as a map of the patches.

    Args:
        batch: One micro-batch of images.
        dataset: Where they are from.
        label_names: Of the classes.
        selection: Of this batch.
        console: Where to print.
        count: Images to print.
    """
    tokens = batch.documents.shape[1]
    side = math.isqrt(tokens)
    for row in range(min(count, len(batch.documents))):
        draw = int(batch.documents[row, 0])
        place, name = dataset[draw % len(dataset)].path, _class_name(batch, row, label_names)
        header = f"row {row}, draw {draw}: {place}, class {name}, {tokens} tokens"
        chosen = [] if selection is None else selection.mask(tokens)[row].tolist()
        header += f", {sum(chosen)} selected" if chosen else ""
        console.print(header, soft_wrap=True, markup=False, highlight=False)
        # Tokens that are no patch, such as the class token, come first.
        others, patches = chosen[: tokens - side * side], chosen[tokens - side * side :]
        lines = [others, *(patches[start : start + side] for start in range(0, side * side, side))]
        for line in filter(None, lines):
            console.print(" ".join("■" if each else "·" for each in line), highlight=False)


def _class_name(batch: Batch, row: int, label_names: Sequence[str] | None) -> str:
    number = int(batch.inputs["labels"][row])
    return f"{number} ({label_names[number]})" if label_names else str(number)


def _print_legend(console: Console, marked: bool, with_selection: bool, learnt: str) -> None:
    legend = Text("tokens: ")
    meanings = {(False, False): "context", (True, False): learnt}
    if with_selection:
        meanings |= {(False, True): "selected (receives gradient)", (True, True): "both"}
    for index, (kind, meaning) in enumerate(meanings.items()):
        legend.append("   " if index else "")
        _append(legend, meaning, kind, marked)
    console.print(legend, soft_wrap=True, highlight=False)


def _append(text: Text, piece: str, kind: tuple[bool, bool], marked: bool) -> None:
    style, before, after = APPEARANCE[kind]
    text.append(f"{before}{piece}{after}" if marked else piece, style=style)


def _marked_up(
    input_ids: Tensor, learnt: Tensor, chosen: Tensor, tokenizer: PreTrainedTokenizerBase, marked: bool
) -> Text:
    """The text of `input_ids` `[tokens]` with the appearance that the two masks `[tokens]` call for."""
    ids = input_ids.tolist()
    text = Text()
    end, written = 0, 0
    for kind, run in groupby(zip(learnt.tolist(), chosen.tolist(), strict=True)):
        end += sum(1 for _ in run)
        # Decoded from the start each time: a run alone loses its leading blank with many tokenizers. A character
        # whose bytes are spread over two runs decodes to a replacement mark first, and is shown with the second.
        decoded = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if end < len(ids):
            decoded = decoded.rstrip("\ufffd")
        _append(text, decoded[written:], kind, marked)
        written = len(decoded)
    return text
