from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from rich.console import Console

from framework.data import Batch, evaluation_batches, load_dataset, show_samples
from framework.selection import Selection


def make_batch(tmp_path: Path, tokenizer, packing: bool = False) -> Batch:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"[{i}]\n", "completion": "b c"}) + "\n" for i in range(2)))
    dataset = load_dataset(path, tokenizer=tokenizer, sequence_length=24)
    (batch,) = evaluation_batches(dataset, sequence_length=24, micro_batch_size=2, pad_token_id=0, packing=packing)
    return batch


def printed(*arguments, color_system: str | None = None, **options) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, color_system=color_system, force_terminal=color_system is not None, width=60)
    show_samples(*arguments, console=console, **options)
    return stream.getvalue().splitlines()


def test_a_log_shows_labels_with_marks(tmp_path: Path, tiny_tokenizer) -> None:
    lines = printed(make_batch(tmp_path, tiny_tokenizer), tiny_tokenizer)
    assert lines[0] == "tokens: context   ⟦supervised (to be learnt)⟧"
    assert [line.rstrip(" ─") for line in lines[1:]] == [
        "row 0, draw 0: 8 tokens, 4 supervised",
        "[0]",
        "⟦b c<end>⟧",
        "row 1, draw 1: 8 tokens, 4 supervised",
        "[1]",
        "⟦b c<end>⟧",
    ]


def test_a_log_shows_the_selection_too(tmp_path: Path, tiny_tokenizer) -> None:
    positions = torch.tensor([[0, 2, 5], [4, 5, 6]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    selection = Selection(positions, valid, torch.ones(2, 3))
    lines = printed(make_batch(tmp_path, tiny_tokenizer), tiny_tokenizer, selection)
    assert lines[0] == "tokens: context   ⟦supervised (to be learnt)⟧   ⟪selected (receives gradient)⟫   ⟦⟪both⟫⟧"
    assert [line.rstrip(" ─") for line in lines[1:]] == [
        "row 0, draw 0: 8 tokens, 4 supervised, 3 selected",
        "⟪[⟫0⟪]⟫",
        "⟦b⟧⟦⟪ ⟫⟧⟦c<end>⟧",
        "row 1, draw 1: 8 tokens, 4 supervised, 2 selected",
        "[1]",
        "⟦⟪b ⟫⟧⟦c<end>⟧",
    ]


def test_packed_documents_are_shown_one_by_one_up_to_the_count(tmp_path: Path, tiny_tokenizer) -> None:
    batch = make_batch(tmp_path, tiny_tokenizer, packing=True)
    headers = [line.rstrip(" ─") for line in printed(batch, tiny_tokenizer) if line.startswith("row")]
    assert headers == ["row 0, draw 0: 8 tokens, 4 supervised", "row 0, draw 1: 8 tokens, 4 supervised"]
    assert len([line for line in printed(batch, tiny_tokenizer, count=1) if line.startswith("row")]) == 1


def test_a_terminal_shows_colours_instead_of_marks(tmp_path: Path, tiny_tokenizer) -> None:
    lines = printed(make_batch(tmp_path, tiny_tokenizer), tiny_tokenizer, color_system="standard")
    assert not any("⟦" in line for line in lines)
    assert "\x1b[1;32mb c<end>\x1b[0m" in lines
