"""Reasoning, tools and their calls in assistant turns: what of them is learnt, and what a template leaves out."""

from __future__ import annotations

import json

import pytest
from rendered_turns import CALL, TEMPLATES, TWO_TURNS, USES_TOOLS, marked, record, refusal, with_special_tokens
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_special_tokens(tiny_tokenizer)


def test_reasoning(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["qwen 3"]
    header, end = "<|im_start|>assistant\n", "<|im_end|>"
    reasons = record([("user", "a"), ("assistant", "<think>w</think>b")])
    question = f"<|im_start|>user\na{end}\n"
    assert marked(tokenizer, reasons) == f"{question}{header}⟦<think>\nw\n</think>\n\nb{end}⟧\n"
    separate = record([("user", "a"), {"role": "assistant", "content": "b", "reasoning_content": "w"}])
    assert marked(tokenizer, separate) == marked(tokenizer, reasons)
    no_thinking = record([("user", "a"), ("assistant", "b")], chat_template_kwargs={"enable_thinking": False})
    assert marked(tokenizer, no_thinking) == f"{question}{header}<think>\n\n</think>\n\n⟦b{end}⟧\n"

    # The reasoning of an answer that others follow is not in the text: nothing to learn it from.
    for first in ({"content": "<think>w</think>b"}, {"content": "b", "reasoning_content": "w"}):
        several = record(
            [("user", "a"), {"role": "assistant", **first}, ("user", "c"), ("assistant", "<think>v</think>d")]
        )
        assert refusal(tokenizer, several).startswith(
            "the chat template drops a part of messages[1] when more messages follow (such templates drop the "
            'reasoning of earlier answers), so that it cannot carry labels: set data.train_on to "last_assistant"'
        )
        assert marked(tokenizer, several, "last_assistant") == (
            f"{question}{header}b{end}\n<|im_start|>user\nc{end}\n{header}⟦<think>\nv\n</think>\n\nd{end}⟧\n"
        )
        first["train"] = False
        exempt = record([("user", "a"), {"role": "assistant", **first}, ("user", "c"), ("assistant", "d")])
        assert marked(tokenizer, exempt).count("⟦") == 1

    # Within the steps of one answer reasoning is kept.
    steps = [USES_TOOLS[0], USES_TOOLS[1] | {"content": "<think>w</think>"}, *USES_TOOLS[2:]]
    assert marked(tokenizer, record(steps)) == (
        f"{question}{header}⟦<think>\nw\n</think>\n\n<tool_call>f</tool_call>{end}⟧\n"
        f"<|im_start|>user\nr{end}\n{header}⟦<think>\n\n</think>\n\ne{end}⟧\n"
    )
    assert marked(tokenizer, record(USES_TOOLS)) == (
        f"{question}{header}⟦<tool_call>f</tool_call>{end}⟧\n"
        f"<|im_start|>user\nr{end}\n{header}⟦<think>\n\n</think>\n\ne{end}⟧\n"
    )


def test_reasoning_that_a_template_never_shows_is_refused(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["qwen 2.5"]
    thinks = {"role": "assistant", "content": "b", "reasoning_content": "w"}
    assert refusal(tokenizer, record([("user", "a"), thinks])).startswith(
        "the chat template leaves out a part of `reasoning_content` in messages[1], so that it cannot be learnt"
    )
    # DeepSeek R1's takes the reasoning away from every answer.
    tokenizer.chat_template = TEMPLATES["phi 3"].replace("message.content", "message.content.split('</think>')[-1]")
    assert refusal(tokenizer, record([("user", "a"), ("assistant", "<think>w</think>b")])).startswith(
        "the chat template leaves out a part of `content` in messages[1]"
    )


def test_tools_and_their_calls(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["qwen 2.5"]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    forms = [
        (USES_TOOLS, [tool]),
        (
            [*USES_TOOLS[:1], {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]}, *USES_TOOLS[2:]],
            [tool],
        ),
        (
            [
                *USES_TOOLS[:1],
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}, "id": "7"}]},
                *USES_TOOLS[2:],
            ],
            json.dumps([tool["function"]]),
        ),
    ]
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    expected = (
        f"<|im_start|>system\nS\n{json.dumps(tool)}<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{call}<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\nr\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦e<|im_end|>⟧\n"
    )
    for messages, tools in forms:
        assert marked(tokenizer, record(messages, tools=tools)) == expected


def test_tools_that_a_template_leaves_out_are_refused(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["llama 3"]
    assert refusal(tokenizer, record(TWO_TURNS, tools=[CALL["function"]])).startswith(
        "the chat template leaves out `tools`: it knows no `tools`"
    )
    assert refusal(tokenizer, record(USES_TOOLS)).startswith(
        "the chat template leaves out messages with `tool_calls`: it knows no `tool_calls`"
    )
    assert refusal(tokenizer, record(TWO_TURNS, chat_template_kwargs={"enable_thinking": False})).startswith(
        "the chat template leaves out `enable_thinking` in `chat_template_kwargs`"
    )


def test_a_template_of_its_own_for_tools_is_taken(tokenizer) -> None:
    tokenizer.chat_template = {"default": TEMPLATES["llama 3"], "tool_use": TEMPLATES["qwen 2.5"]}
    assert marked(tokenizer, record(TWO_TURNS)).startswith("<bos><|start_header_id|>")
    assert marked(tokenizer, record(USES_TOOLS, tools=[CALL["function"]])).startswith("<|im_start|>system")
