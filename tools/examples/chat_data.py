"""What the examples share: their arguments, and conversations as token ids with labels on the assistant's turns."""

from __future__ import annotations

import argparse

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100


def arguments(description: str | None) -> argparse.Namespace:
    """The command line; the defaults are what `make demo` and an export of its run leave."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--model", default="runs/tiny/export", help="a model with its tokenizer: directory or hub name"
    )
    options.add_argument("--data", default="data/default/train.jsonl", help="JSON lines with a key `messages`")
    options.add_argument("--output", default="runs/example", help="directory for checkpoints and the model")
    options.add_argument("--max-steps", type=int, default=20, help="optimiser steps")
    return options.parse_args()


def conversations(path: str) -> Dataset:
    """The file's records, with the key `messages` alone."""
    return load_dataset("json", data_files=path, split="train").select_columns("messages")


def tokenized(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> Dataset:
    """Token ids and labels; the chat template marks the assistant's turns with `{% generation %}`."""

    def encode(record: dict) -> dict:
        encoded = tokenizer.apply_chat_template(
            record["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        return {
            "input_ids": encoded["input_ids"],
            "labels": [token if assistant else IGNORED for token, assistant in marked],
        }

    data = conversations(path).map(encode, remove_columns="messages")
    return data.filter(lambda record: len(record["input_ids"]) <= max_length)
