"""From records to tokens with a mask of those that carry a label.

Every function here takes the records of one chunk and returns for each `(ids, supervised)`: token ids, int32
`[sequence]`, and bool `[sequence]`, true where the token is one that the model must learn to say. The mask is made by
position, never by comparing ids, so a padding token that equals the end of sequence hides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from framework.data.formats import Record
from framework.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Labelled = tuple[np.ndarray, np.ndarray]
Span = tuple[int, int]

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def label_text(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Labelled]:
    """`text`: the tokenizer's own tokens of the text, special ones that it adds included, each with a label."""
    encoded = _encode([record.content["text"] for record in records], tokenizer)["input_ids"]
    return [(np.asarray(ids, np.int32), np.ones(len(ids), bool)) for ids in encoded]


def label_completion(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Labelled]:
    """`completion`: labels on the completion and the end-of-sequence token after it.

    Prompt and completion are tokenised separately, so the prompt's tokens are exactly those that it has when the
    model is asked to go on from it: no token spans the boundary. Tokens that the tokenizer puts before a text (the
    beginning of sequence) are kept, those that it puts behind the prompt are not.

    Raises:
        UserError: The tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "data.format: `completion` needs an end-of-sequence token, which this tokenizer has not: set `eos_token`"
        )
    prompts = _encode([record.content["prompt"] for record in records], tokenizer)["input_ids"]
    completions = [record.content["completion"] for record in records]
    completions = _encode(completions, tokenizer, add_special_tokens=False)["input_ids"]
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


def label_messages(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Labelled]:
    """`messages`: the chat template's tokens, with labels on assistant turns, their end-of-turn token included.

    Templates with `{% generation %}` markers say themselves which text is the assistant's. With others it is found
    by rendering growing prefixes of the conversation: a turn reaches from the end of the prompt before it (assistant
    header included) to the end of the rendering with it; blanks after the turn's last special token (the line break
    after an `<|im_end|>`) are not the assistant's. A token belongs to a turn when any character of it does.

    Raises:
        UserError: There is no chat template, it cannot render a conversation, it does not mark a text of the assistant
            although it has markers, or it has none and its renderings are not prefixes of each other.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "data.format: `messages` needs a tokenizer that knows the characters of its tokens (tokenizer.json)"
        )
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            "data.format: `messages` needs a chat template, which this tokenizer has not: put a chat_template.jinja "
            "beside its files, or use the format `completion`"
        ) from error
    if GENERATION_MARKER.search(template):
        rendered = [_marked_spans(record, template, tokenizer) for record in records]
    else:
        ends = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
        rendered = [_prefix_spans(record, template, tokenizer, ends) for record in records]
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


LABELLERS = {"messages": label_messages, "completion": label_completion, "text": label_text}
"""For each format the function that tokenises and labels a chunk of records."""


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True) -> BatchEncoding:
    # Not verbose: samples over the tokenizer's own length limit are the business of `data.sequence_length`.
    return tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)


def _tokens_added_behind(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer puts behind a single text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return len(whole) - len(plain) - before


def _render(
    record: Record, messages: list[dict[str, Any]], template: str, tokenizer: PreTrainedTokenizerBase, **options: bool
) -> tuple[str, list[Span]]:
    """Text of a conversation and, with `return_assistant_tokens_mask`, the character spans of its marked parts."""
    # Templates print a null (of `"name": null`, say) as `None`; transformers from 5.23 on drops such keys itself.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        texts, spans = render_jinja_template(
            conversations=[messages], chat_template=template, **options, **tokenizer.special_tokens_map
        )
    except TemplateError as error:
        raise UserError(f"{record.place}: the chat template cannot render these messages: {error}") from error
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


def _marked_spans(record: Record, template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    messages = record.content["messages"]
    text, spans = _render(record, messages, template, tokenizer, return_assistant_tokens_mask=True)
    spans = [(start, end) for start, end in spans if end > start]
    if not spans and any(message["role"] == "assistant" and message["content"] for message in messages):
        raise UserError(
            f"{record.place}: the chat template has `{{% generation %}}` markers, but marks nothing in a conversation "
            "with an assistant turn: mend the template, or take the markers out to have the turns found by rendering"
        )
    return text, spans


def _prefix_spans(
    record: Record, template: str, tokenizer: PreTrainedTokenizerBase, ends: tuple[str, ...]
) -> tuple[str, list[Span]]:
    """`ends` are the tokenizer's added tokens: those that can end a turn."""
    messages = record.content["messages"]
    text, _ = _render(record, messages, template, tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise UserError(
                f"{record.place}: the conversation begins with the assistant; without `{{% generation %}}` markers in "
                "the chat template its header cannot be told from its answer: begin with a user or system message"
            )
        prompt, _ = _render(record, messages[:index], template, tokenizer, add_generation_prompt=True)
        through, _ = _render(record, messages[: index + 1], template, tokenizer)
        # Some templates (Phi 3) close every rendering with an end of sequence; it is no part of a turn in the middle.
        if not text.startswith(through) and tokenizer.eos_token:
            through = through.removesuffix(tokenizer.eos_token)
        if not (through.startswith(prompt) and text.startswith(through)):
            raise UserError(
                f"{record.place}: the chat template is not prefix-preserving: it renders messages 0 to {index} "
                "differently when more follow or when the answer is still to come, so assistant turns cannot be found. "
                "Put `{% generation %}` … `{% endgeneration %}` around the assistant's text in the template, or give "
                "the data as `completion` records"
            )
        turn = through[len(prompt) :]
        # Blanks behind a turn's last special token are not the assistant's: the model has stopped by then.
        if turn.rstrip().endswith(ends):
            turn = turn.rstrip()
        spans.append((len(prompt), len(prompt) + len(turn)))
    return text, [(start, end) for start, end in spans if end > start]


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
