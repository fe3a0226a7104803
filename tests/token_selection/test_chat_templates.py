"""Turns in published chat templates, which TRL brings along, against TRL's copies with `{% generation %}` markers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from framework.data.conversations import conversation
from framework.data.turns import render
from framework.errors import UserError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

SPECIAL = re.compile(r"<[|\uff5c][^<>{}' ]+[|\uff5c]>|<(?:start|end)_of_turn>")

SYSTEM, QUESTION, FOLLOW_UP = (("system", "s"), ("user", "a"), ("user", "d"))
PLAIN = (QUESTION, ("assistant", "b c"), FOLLOW_UP, ("assistant", " e\n"))
REASONED = (
    QUESTION,
    ("assistant", "<think>\nw\n</think>\n\nb c"),
    FOLLOW_UP,
    ("assistant", "<think>\nv\n</think>\n\ne"),
)


def learnt(tokenizer: PreTrainedTokenizerFast, name: str, messages: tuple, train_on: str = "assistant") -> str:
    """What is learnt of a conversation, run together without blanks: whether those behind a turn's end are, differs."""
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in set(SPECIAL.findall(tokenizer.chat_template))])
    content = {"messages": [{"role": role, "content": content} for role, content in messages]}
    text, spans = render(conversation("data.jsonl:1", content, train_on=train_on), tokenizer)
    return "".join("".join(text[start:end] for start, end in spans).split())


@pytest.mark.parametrize("messages", [PLAIN, (SYSTEM, *PLAIN), REASONED], ids=["plain", "system", "reasoned"])
@pytest.mark.parametrize(
    "name",
    ["cohere", "gemma", "gemma3", "lfm2", "llama3", "phi3", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"],
)
def test_turns_are_those_that_are_marked(tiny_tokenizer, name: str, messages: tuple) -> None:
    if name == "gemma" and messages[0] == SYSTEM:
        with pytest.raises(UserError, match="System role not supported"):
            learnt(tiny_tokenizer, name, messages)
        return
    found = learnt(tiny_tokenizer, name, messages)
    assert found.startswith("<think>w</think>bc<" if messages is REASONED else "bc<")
    assert found == learnt(tiny_tokenizer, f"{name}_training", messages)


@pytest.mark.parametrize("messages", [PLAIN, REASONED], ids=["plain", "reasoned"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl", "qwen2_5"])
def test_the_last_turn_is_the_one_that_is_marked(tiny_tokenizer, name: str, messages: tuple) -> None:
    found = learnt(tiny_tokenizer, name, messages, "last_assistant")
    assert found == learnt(tiny_tokenizer, f"{name}_training", messages, "last_assistant")


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        # The prompt that asks for an answer opens a thought that earlier answers in the text do not have.
        ("qwen3_5_think", PLAIN, "not prefix-preserving"),
        ("deepseekv3", PLAIN, "not prefix-preserving"),
        # A last answer ends with another token than earlier ones.
        ("gptoss", PLAIN, "not prefix-preserving"),
        ("qwen3", REASONED, "drops a part of messages\\[1\\] when more messages follow"),
        # A template for text in parts, beside images.
        ("smolvlm", PLAIN, "leaves out a part of `content` in messages\\[1\\]"),
    ],
)
def test_what_cannot_be_learnt_exactly_is_refused(tiny_tokenizer, name: str, messages: tuple, reason: str) -> None:
    with pytest.raises(UserError, match=f"data\\.jsonl:1: the chat template .*{reason}"):
        learnt(tiny_tokenizer, name, messages)
