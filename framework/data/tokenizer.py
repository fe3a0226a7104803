"""Loading a tokenizer with its chat template."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from framework.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer, chat template included.

    A tokenizer without a padding token gets its end-of-sequence token for it. That is safe here: attention and labels
    mask padding by position, never by token, so a real end of sequence keeps its label.

    Args:
        path: A local directory, or a name on the Hugging Face hub.

    Raises:
        UserError: There is no tokenizer at `path`, or it has neither a padding nor an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path))
    except (OSError, ValueError, KeyError) as error:
        # transformers explains over many lines; the first says what happened.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"model.tokenizer: cannot load a tokenizer from {path!r}: {reason}\n"
            "Give a directory with tokenizer.json and tokenizer_config.json, or a hub name that this machine can reach "
            "or has in its cache, as model.tokenizer (default: model.path)."
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.tokenizer: the tokenizer at {path!r} has neither a padding nor an end-of-sequence token; "
                "name one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
