"""Loading a tokenizer with its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from framework.errors import UserError
from framework.hub import PUBLIC_MAIN, HubOptions, loading, source_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ADVICE = (
    "Give a directory with tokenizer.json and tokenizer_config.json, or a hub name that this machine can reach "
    "or has in its cache, as model.tokenizer (default: model.path)."
)


def load_tokenizer(
    path: str, *, hub: HubOptions = PUBLIC_MAIN, added_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, chat template included.

    A tokenizer without a padding token gets its end-of-sequence token for it. That is safe here: attention and labels
    mask padding by position, never by token, so a real end of sequence keeps its label.

    Args:
        path: A local directory, or a name on the Hugging Face hub.
        hub: Revision, network and code.
        added_tokens: Tokens to add, each one token wherever it stands in a text. They are not special: decoding shows
            them, as an answer's markers must.

    Raises:
        UserError: There is no tokenizer at `path`, it has neither a padding nor an end-of-sequence token, or it has one
            of the added tokens already.
    """
    from transformers import AutoTokenizer

    what, failures = f"a tokenizer from {path!r}", (OSError, ValueError, KeyError)
    with loading("model.tokenizer", what, path, hub, failures=failures, advice=ADVICE):
        tokenizer = AutoTokenizer.from_pretrained(source_name(path), **hub.keywords())
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.tokenizer: the tokenizer at {path!r} has neither a padding nor an end-of-sequence token; "
                "name one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    _add_tokens(tokenizer, added_tokens, path)
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, added_tokens: Sequence[str], path: str) -> None:
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    known = [f"{token} (id {vocabulary[token]})" for token in added_tokens if token in vocabulary]
    if known:
        raise UserError(
            f"model.added_tokens: {', '.join(known)}: the tokenizer at {path!r} has it already; leave it out"
        )
    if added_tokens:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added_tokens])
