"""From records to tokens with a mask of those that carry a label.

Every labeller here takes the records of one chunk and returns for each `(ids, supervised)`: token ids, int32
`[sequence]`, and bool `[sequence]`, true where the token is one that the model must learn to say. The mask is made by
position, never by comparing ids, so a padding token that equals the end of sequence hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from framework.data.conversations import Conversation, conversation
from framework.data.dialects import alpaca_prompt, from_alpaca, from_chat_completion, from_sharegpt, is_chat
from framework.data.formats import Record
from framework.data.turns import Span, render, turn_ends
from framework.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Labelled = tuple[np.ndarray, np.ndarray]

CHAT_FORMATS = ("messages", "sharegpt", "alpaca", "completion")
"""Formats that may be conversations, for which `data.train_on` says which turns carry labels."""


def label_records(
    format: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, train_on: str = "assistant"
) -> list[Labelled]:
    """Tokenise and label a chunk of records of one format.

    Args:
        format: One of `LABELLERS`.
        records: Valid ones.
        tokenizer: From `load_tokenizer`.
        train_on: `assistant`: every turn of the assistant carries labels; `last_assistant`: the last one.

    Raises:
        UserError: The tokenizer lacks what the format needs, or its chat template cannot render a conversation so that
            the assistant's turns can be found.
    """
    labeller = LABELLERS[format]
    return labeller(records, tokenizer, train_on=train_on) if format in CHAT_FORMATS else labeller(records, tokenizer)


def label_text(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Labelled]:
    """`text`: the tokenizer's own tokens of the text, special ones that it adds included, each with a label."""
    encoded = _encode([record.content["text"] for record in records], tokenizer)["input_ids"]
    return [(np.asarray(ids, np.int32), np.ones(len(ids), bool)) for ids in encoded]


def label_completion(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, train_on: str = "assistant"
) -> list[Labelled]:
    """`completion`: labels on the completion and the end-of-sequence token after it.

    Prompt and completion are tokenised separately, so the prompt's tokens are exactly those that it has when the
    model is asked to go on from it: no token spans the boundary. Tokens that the tokenizer puts before a text (the
    beginning of sequence) are kept, those that it puts behind the prompt are not.

    Where both are lists of messages they are one conversation, with labels on what the assistant says in the
    completion.

    Raises:
        UserError: The tokenizer has no end-of-sequence token; or as `label_messages`.
    """
    chats = [
        conversation(each.place, from_chat_completion(each.content), train_on=train_on)
        for each in records
        if is_chat(each.content)
    ]
    texts = [(each.content["prompt"], each.content["completion"]) for each in records if not is_chat(each.content)]
    of_chats, of_texts = iter(_label_conversations(chats, tokenizer)), iter(_label_pairs(texts, tokenizer))
    return [next(of_chats if is_chat(record.content) else of_texts) for record in records]


def label_messages(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, train_on: str = "assistant"
) -> list[Labelled]:
    """`messages`: the chat template's tokens, with labels on assistant turns, their end-of-turn token included.

    A message with `"train": false` or `"weight": 0` carries none. See `framework.data.turns` for how turns are found. A
    token belongs to a turn when any character of it does.

    Raises:
        UserError: There is no chat template, it cannot render a conversation, or turns cannot be found.
    """
    chats = [conversation(record.place, record.content, train_on=train_on) for record in records]
    return _label_conversations(chats, tokenizer)


def label_sharegpt(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, train_on: str = "assistant"
) -> list[Labelled]:
    """`sharegpt`: as `messages`, with the roles that its speakers are. Raises as `label_messages` does."""
    chats = [conversation(record.place, from_sharegpt(record.content), train_on=train_on) for record in records]
    return _label_conversations(chats, tokenizer)


def label_alpaca(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, train_on: str = "assistant"
) -> list[Labelled]:
    """`alpaca`: as `messages` with instruction and input as the user's turn where the tokenizer has a chat template.

    Without one, as `completion` with Stanford Alpaca's own prompt.

    Raises:
        UserError: There is no chat template, but a record has `system` or `history`; or as `label_messages`.
    """
    if tokenizer.chat_template:
        chats = [conversation(record.place, from_alpaca(record.content), train_on=train_on) for record in records]
        return _label_conversations(chats, tokenizer)
    for record in records:
        if extra := [key for key in ("system", "history") if record.content.get(key)]:
            raise UserError(
                f"{record.place}: `{extra[0]}` needs a chat template, which this tokenizer has not: put a "
                "chat_template.jinja beside its files, or leave the key out"
            )
    return _label_pairs([(alpaca_prompt(record.content), record.content["output"]) for record in records], tokenizer)


LABELLERS: dict[str, Callable[..., list[Labelled]]] = {
    "messages": label_messages,
    "sharegpt": label_sharegpt,
    "alpaca": label_alpaca,
    "completion": label_completion,
    "text": label_text,
}
"""For each format the function that tokenises and labels a chunk of records; in `CHAT_FORMATS` they take `train_on`."""


def _label_pairs(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Labelled]:
    """Label the second text of each pair and the end-of-sequence token after it."""
    if not pairs:
        return []
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "data.format: `completion` needs an end-of-sequence token, which this tokenizer has not: set `eos_token`"
        )
    prompts = _encode([prompt for prompt, _ in pairs], tokenizer)["input_ids"]
    completions = _encode([completion for _, completion in pairs], tokenizer, add_special_tokens=False)["input_ids"]
    added_behind = _tokens_added_behind(tokenizer)
    labelled = []
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt = prompt[: len(prompt) - added_behind]
        if not completion or completion[-1] != end:
            completion = [*completion, end]
        supervised = np.zeros(len(prompt) + len(completion), bool)
        supervised[len(prompt) :] = True
        labelled.append((np.asarray(prompt + completion, np.int32), supervised))
    return labelled


def _label_conversations(chats: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Labelled]:
    """Label the tokens of the turns that are learnt."""
    if not chats:
        return []
    if not tokenizer.is_fast:
        raise UserError(
            "data.format: conversations need a tokenizer that knows the characters of its tokens (tokenizer.json)"
        )
    ends = turn_ends(tokenizer)
    rendered = [render(chat, tokenizer, ends) for chat in chats]
    encoded = _encode([text for text, _ in rendered], tokenizer, add_special_tokens=False)
    labelled = []
    for index, (text, spans) in enumerate(rendered):
        ids = np.asarray(encoded["input_ids"][index], np.int32)
        supervised = np.zeros(len(ids), bool)
        for span in spans:
            first, last = _tokens_of(span, text, encoded, index, len(ids))
            supervised[first:last] = True
        labelled.append((ids, supervised))
    return labelled


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True) -> BatchEncoding:
    # Not verbose: samples over the tokenizer's own length limit are the business of `data.sequence_length`.
    return tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)


def _tokens_added_behind(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer puts behind a single text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return len(whole) - len(plain) - before


def _tokens_of(span: Span, text: str, encoded: BatchEncoding, index: int, length: int) -> Span:
    """Tokens `[first, last)` that have a character of `span`; some characters (stripped blanks) are in no token."""
    start, end = span
    first = _token_from(start, text, encoded, index, length)
    last = _token_from(end, text, encoded, index, length)
    # The token that holds the span's last character may go on behind it.
    holder = next((t for c in range(end - 1, start - 1, -1) if (t := encoded.char_to_token(index, c)) is not None), -1)
    return first, max(last, holder + 1)


def _token_from(start: int, text: str, encoded: BatchEncoding, index: int, length: int) -> int:
    """The first token that has a character at `start` or behind it; `length` if there is none."""
    found = (encoded.char_to_token(index, character) for character in range(start, len(text)))
    return next((token for token in found if token is not None), length)
