"""Finding the assistant's turns in what a chat template makes of a conversation.

Templates with `{% generation %}` markers say themselves which text is the assistant's. Most published ones have none:
there it is found by rendering growing prefixes of the conversation. A turn reaches from the end of the prompt before
it, assistant header included, to the end of the rendering with it; blanks after the turn's last special token (the line
break after an `<|im_end|>`) are not the assistant's, for the model has stopped by then.

Where a template renders an answer in another way once more messages follow (Qwen 3 puts an empty `<think>` block in
front of a last answer only), the turn is taken as it stands in the whole conversation, if nothing of the message is
missing there.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from framework.data.conversations import Conversation
from framework.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character, and the one after the last."""

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

SPOKEN_KEYS = ("content", "reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's message whose texts it must learn to say."""


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens that can end a turn: those that were added to the vocabulary."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values())


def render(
    chat: Conversation, tokenizer: PreTrainedTokenizerBase, ends: tuple[str, ...] | None = None
) -> tuple[str, list[Span]]:
    """The text that the tokenizer's chat template makes of a conversation, and the spans of the turns that are learnt.

    Args:
        chat: The conversation.
        tokenizer: With the chat template.
        ends: Its `turn_ends`, for those who render many conversations.

    Raises:
        UserError: There is no chat template, it cannot render the conversation or leaves out a part of it, it does not
            mark a text of the assistant although it has markers, or it has none and turns cannot be found by prefixes.
    """
    template = _Template(chat, tokenizer, turn_ends(tokenizer) if ends is None else ends)
    text, spans = template.marked() if template.has_markers else template.by_prefixes()
    return text, [(start, end) for start, end in spans if end > start]


class _Template:
    """The chat template of a tokenizer, applied to one conversation."""

    def __init__(self, chat: Conversation, tokenizer: PreTrainedTokenizerBase, ends: tuple[str, ...]) -> None:
        self._chat = chat
        self._ends = ends
        self._tokenizer = tokenizer
        try:
            self._template = tokenizer.get_chat_template(tools=chat.tools)
        except ValueError as error:
            raise UserError(
                f"{chat.place}: a conversation needs a chat template, which this tokenizer has not: put a "
                "chat_template.jinja beside its files, or give the data as texts, `prompt` and `completion`"
            ) from error
        self._check_support()

    @property
    def has_markers(self) -> bool:
        """Whether it marks what the assistant says."""
        return GENERATION_MARKER.search(self._template) is not None

    def marked(self) -> tuple[str, list[Span]]:
        """Text and learnt spans by the template's own markers."""
        chat = self._chat
        text, spans = self._render(len(chat.messages), return_assistant_tokens_mask=True)
        spoken = [learnt for message, learnt in zip(chat.messages, chat.learnt, strict=True) if _is_assistant(message)]
        if not any(self._chat.learnt):
            return text, []
        if all(spoken):
            if not any(end > start for start, end in spans) and any(map(_says_something, chat.messages)):
                raise UserError(
                    f"{chat.place}: the chat template has `{{% generation %}}` markers, but marks nothing in a "
                    "conversation with an assistant turn: mend the template, or take the markers out to have the turns "
                    "found by rendering"
                )
            return text, spans
        if len(spans) != len(spoken):
            raise UserError(
                f"{chat.place}: some assistant messages are not to be learnt, but the chat template's "
                f"`{{% generation %}}` markers mark {len(spans)} parts for {len(spoken)} assistant messages: which is "
                "which cannot be told; mend the template, or take the markers out"
            )
        return text, [span for span, learnt in zip(spans, spoken, strict=True) if learnt]

    def by_prefixes(self) -> tuple[str, list[Span]]:
        """Text and learnt spans by rendering growing prefixes."""
        text, _ = self._render(len(self._chat.messages))
        return text, [self._turn(index, text) for index, learnt in enumerate(self._chat.learnt) if learnt]

    def _turn(self, index: int, text: str) -> Span:
        place, tokenizer = self._chat.place, self._tokenizer
        if index == 0:
            raise UserError(
                f"{place}: the conversation begins with the assistant; without `{{% generation %}}` markers in "
                "the chat template its header cannot be told from its answer: begin with a user or system message"
            )
        prompt, _ = self._render(index, add_generation_prompt=True)
        through, _ = self._render(index + 1)
        # Some templates (Phi 3) close every rendering with an end of sequence; it is no part of a turn in the middle.
        if not text.startswith(through) and tokenizer.eos_token:
            through = through.removesuffix(tokenizer.eos_token)
        if not (through.startswith(prompt) and text.startswith(prompt)):
            self._refuse(index)
        turn, end = self._up_to_end(through[len(prompt) :])
        if not end:
            warnings.warn(
                f"{place}: the chat template ends an answer without a special token, so no label teaches the model to "
                "stop there",
                stacklevel=2,
            )
        if not text.startswith(through):
            as_last = turn
            reach = text.find(end, len(prompt)) if end else -1
            turn = text[len(prompt) : reach + len(end)]
            if reach < 0 or not as_last.endswith(turn):
                self._refuse(index)
            if self._missing(index, turn) and not self._missing(index, as_last):
                raise UserError(
                    f"{place}: the chat template drops a part of messages[{index}] when more messages follow (such "
                    "templates drop the reasoning of earlier answers), so that it cannot carry labels: set "
                    'data.train_on to "last_assistant", or give each answer a record of its own'
                )
        if missing := self._missing(index, turn):
            raise UserError(
                f"{place}: the chat template leaves out a part of `{missing}` in messages[{index}], so that it cannot "
                "be learnt: mend the template, or take out what the model should not learn"
            )
        return len(prompt), len(prompt) + len(turn)

    def _up_to_end(self, turn: str) -> tuple[str, str]:
        """A turn without the blanks behind its last special token, and this token; "" if it does not end with one."""
        stripped = turn.rstrip()
        if not stripped.endswith(self._ends):
            return turn, ""
        return stripped, max((end for end in self._ends if stripped.endswith(end)), key=len)

    def _missing(self, index: int, turn: str) -> str | None:
        """A key of a message that is not all in its turn, whatever the template does to blanks; None if all are."""
        message, turn = self._chat.messages[index], _squeezed(turn)
        for key in SPOKEN_KEYS:
            if isinstance(value := message.get(key), str) and _squeezed(value) not in turn:
                return key
        calls = message.get("tool_calls", [])
        return None if all(call["function"]["name"] in turn for call in calls) else "tool_calls"

    def _refuse(self, index: int) -> None:
        raise UserError(
            f"{self._chat.place}: the chat template is not prefix-preserving: it renders messages 0 to {index} "
            "differently when more follow or when the answer is still to come, so assistant turns cannot be found. "
            "Put `{% generation %}` … `{% endgeneration %}` around the assistant's text in the template, set "
            'data.train_on to "last_assistant" if only earlier turns change, or give the data as texts, `prompt` and '
            "`completion`"
        )

    def _check_support(self) -> None:
        chat = self._chat
        needed = {"tools": "`tools`"} if chat.tools else {}
        if any("tool_calls" in message for message in chat.messages):
            needed["tool_calls"] = "messages with `tool_calls`"
        needed |= {name: f"`{name}` in `chat_template_kwargs`" for name in chat.variables}
        for name, description in needed.items():
            if name not in self._template:
                raise UserError(
                    f"{chat.place}: the chat template leaves out {description}: it knows no `{name}`; use a tokenizer "
                    "whose template does, or leave them out of the data"
                )

    def _render(self, count: int, **options: bool) -> tuple[str, list[Span]]:
        """Text of the first messages and, with `return_assistant_tokens_mask`, the spans of its marked parts."""
        chat = self._chat
        variables: dict[str, Any] = {**self._tokenizer.special_tokens_map, **chat.variables}
        try:
            texts, spans = render_jinja_template(
                conversations=[chat.messages[:count]],
                tools=chat.tools,
                chat_template=self._template,
                **options,
                **variables,
            )
        except (TemplateError, TypeError) as error:
            raise UserError(f"{chat.place}: the chat template cannot render these messages: {error}") from error
        return texts[0], [tuple(span) for span in spans[0]] if spans else []


def _is_assistant(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant"


def _says_something(message: dict[str, Any]) -> bool:
    return _is_assistant(message) and bool(message["content"] or message.get("tool_calls"))


def _squeezed(text: str) -> str:
    return "".join(text.split())
