"""Showing samples: which tokens are learnt and which receive gradient, for people to look at before they train."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from framework.data.batch import NO_DOCUMENT, Batch
from framework.data.dataset import IGNORED

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
) -> None:
    """Print the documents of a batch with their label mask and, if given, the selection.

    Labels are shown on the tokens that are to be learnt. The selection is shown on the positions that receive
    gradient; the loss of the token to be learnt at i + 1 arises at position i, so the two are one token apart.
    Padding is left out. In a log, where there are no colours, marks stand around the text.

    Args:
        batch: One micro-batch of `Loader` or `evaluation_batches`.
        tokenizer: The one that the batch was made with.
        selection: Of this batch, from `framework.selection.select`.
        console: Where to print; standard output by default.
        count: Documents to print; all by default.
    """
    console = console or Console()
    marked = console.color_system is None
    nothing = torch.zeros_like(batch.documents, dtype=torch.bool)
    chosen = nothing if selection is None else selection.mask(batch.documents.shape[1])
    _print_legend(console, marked, selection is not None)
    shown = 0
    for row in range(batch.documents.shape[0]):
        documents = batch.documents[row]
        for draw in torch.unique_consecutive(documents[documents != NO_DOCUMENT]).tolist():
            if shown == count:
                return
            shown += 1
            places = (documents == draw).nonzero()[:, 0]
            learnt = batch.inputs["labels"][row, places] != IGNORED
            header = f"row {row}, draw {draw}: {len(places)} tokens, {int(learnt.sum())} supervised"
            if selection is not None:
                header += f", {int(chosen[row, places].sum())} selected"
            console.rule(Text(header), align="left", style="none")
            body = _marked_up(batch.inputs["input_ids"][row, places], learnt, chosen[row, places], tokenizer, marked)
            # Not highlighted, or numbers and paths in the text would get colours of their own.
            console.print(body, soft_wrap=True, highlight=False)


def _print_legend(console: Console, marked: bool, with_selection: bool) -> None:
    legend = Text("tokens: ")
    meanings = {(False, False): "context", (True, False): "supervised (to be learnt)"}
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
