"""Assistant turns in the renderings of chat templates that have the structure of published ones."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from framework.data.conversations import check_messages
from framework.data.formats import Record
from framework.data.labels import label_records
from framework.errors import UserError

SPECIAL = (
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> <start_of_turn> <end_of_turn> "
    "<|system|> <|user|> <|assistant|> <|end|>"
).split()

TEMPLATES = {
    "llama 3": """\
{%- for message in messages %}
    {%- set text = '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim %}
    {%- if loop.first %}{% set text = bos_token + text %}{% endif %}
    {{- text + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "qwen 2.5": """\
{%- if messages[0].role != 'system' or tools %}
    {{- '<|im_start|>system\n' }}
    {{- messages[0].content if messages[0].role == 'system' else 'S' }}
    {%- for tool in tools or [] %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{ '\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- elif not (message.role == 'system' and tools) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "qwen 3": """\
{%- set ns = namespace(last_query=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.last_query = messages | length - 1 - loop.index0 %}{% set ns.searching = false %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function.name + '</tool_call>' }}{% endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}""",
    # The first version puts the system message into the first turn, the third into the last one.
    "mistral 1": """\
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- ' [INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "mistral 3": """\
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.last else '') + message.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "gemma": """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {{- message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "phi 3": """\
{%- for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TWO_TURNS = [("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "\ne")]
WITH_SYSTEM = [("system", "s"), *TWO_TURNS]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
USES_TOOLS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "e"},
]


@pytest.fixture
def tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    """A token a character, and one for each special token of the templates."""
    tiny_tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tiny_tokenizer


def record(messages: list, **further) -> Record:
    messages = [
        dict(zip(("role", "content"), each, strict=True)) if isinstance(each, tuple) else each for each in messages
    ]
    content = {"messages": messages, **further}
    assert check_messages(content) is None
    return Record("data.jsonl:7", content)


def marked(tokenizer: PreTrainedTokenizerFast, each: Record, train_on: str = "assistant") -> str:
    """The tokens run together, those with labels in brackets; they are the tokens of the rendering, each once."""
    ((ids, supervised),) = label_records("messages", [each], tokenizer, train_on=train_on)
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    pieces = [f"⟦{token}⟧" if learnt else token for token, learnt in zip(tokens, supervised.tolist(), strict=True)]
    return "".join(pieces).replace("⟧⟦", "")


def refusal(tokenizer: PreTrainedTokenizerFast, each: Record, train_on: str = "assistant") -> str:
    with pytest.raises(UserError) as error:
        label_records("messages", [each], tokenizer, train_on=train_on)
    message = str(error.value)
    assert message.startswith("data.jsonl:7: ") and "\n" not in message
    return message.removeprefix("data.jsonl:7: ")


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        (
            "llama 3",
            WITH_SYSTEM,
            "<bos><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦b c<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nd<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦e<|eot_id|>⟧",
        ),
        (
            "qwen 2.5",
            TWO_TURNS,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b c<|im_end|>⟧\n"
            "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n⟦\ne<|im_end|>⟧\n",
        ),
        (
            "mistral 1",
            WITH_SYSTEM,
            "<bos> [INST] s\n\na [/INST]⟦ b c<end>⟧ [INST] d [/INST]⟦ \ne<end>⟧",
        ),
        ("mistral 3", TWO_TURNS, "<bos>[INST] a[/INST]⟦ b c<end>⟧[INST] d[/INST]⟦ \ne<end>⟧"),
        (
            "gemma",
            TWO_TURNS,
            "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n⟦b c<end_of_turn>⟧\n"
            "<start_of_turn>user\nd<end_of_turn>\n<start_of_turn>model\n⟦e<end_of_turn>⟧\n",
        ),
        (
            "phi 3",
            WITH_SYSTEM,
            "<|system|>\ns<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n⟦b c<|end|>⟧\n"
            "<|user|>\nd<|end|>\n<|assistant|>\n⟦\ne<|end|>\n<end>⟧",
        ),
        # Only the last answer has a `<think>` block; earlier ones are learnt as they stand.
        (
            "qwen 3",
            WITH_SYSTEM,
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b c<|im_end|>⟧\n"
            "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\ne<|im_end|>⟧\n",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value in TEMPLATES else "",
)
def test_turns_of_published_structures(tokenizer, name: str, messages: list, expected: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    each = record(messages)
    assert marked(tokenizer, each) == expected
    assert expected.replace("⟦", "").replace("⟧", "") == tokenizer.apply_chat_template(
        each.content["messages"], tokenize=False
    )
    others, _, last = expected.rpartition("⟦")
    assert marked(tokenizer, each, "last_assistant") == others.replace("⟦", "").replace("⟧", "") + "⟦" + last


def test_ids_are_those_of_the_template(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["gemma"]
    ((ids, supervised),) = label_records("messages", [record(TWO_TURNS[:2])], tokenizer)
    # <bos> <start_of_turn> u s e r \n a <end_of_turn> \n <start_of_turn> m o d e l \n b _ c <end_of_turn> \n
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<start_of_turn>", "<end_of_turn>"))
    assert ids.tolist() == [
        *(1, start, 36, 34, 20, 33, 102, 16, end, 102),
        *(start, 28, 30, 19, 20, 27, 102, 17, 100, 18, end, 102),
    ]
    assert supervised.nonzero()[0].tolist() == [17, 18, 19, 20]


@pytest.mark.parametrize("name", ["mistral 3", "gemma"])
def test_a_system_message_that_a_template_cannot_take_is_refused(tokenizer, name: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    for train_on in ("assistant", "last_assistant"):
        message = refusal(tokenizer, record(WITH_SYSTEM), train_on)
        if name == "gemma":
            assert message == "the chat template cannot render these messages: System role not supported"
        else:
            assert message.startswith("the chat template is not prefix-preserving: it renders messages 0 to ")


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


@pytest.mark.parametrize("markers", [False, True])
def test_messages_that_are_not_to_be_learnt(tokenizer, markers: bool) -> None:
    if not markers:
        tokenizer.chat_template = TEMPLATES["phi 3"]
    first, second = ("b c<end>", "e<end>") if markers else ("b c<|end|>", "e<|end|>\n<end>")

    def learnt(messages: list, train_on: str = "assistant") -> list[str]:
        return [part.split("⟧")[0] for part in marked(tokenizer, record(messages), train_on).split("⟦")[1:]]

    def turns(**keys) -> list:
        return [*TWO_TURNS[:1], {"role": "assistant", "content": "b c", **keys}, *TWO_TURNS[2:3], ("assistant", "e")]

    assert learnt(turns()) == learnt(turns(train=True)) == learnt(turns(weight=1)) == [first, second]
    assert learnt(turns(train=None, weight=None)) == [first, second]
    for exempt in ({"train": False}, {"weight": 0}, {"weight": 0.0, "train": False}):
        assert learnt(turns(**exempt)) == [second]
        assert learnt(turns(**exempt)[:2]) == []
    assert learnt(turns(), "last_assistant") == [second]
    last_exempt = [*TWO_TURNS[:3], {"role": "assistant", "content": "e", "train": False}]
    assert learnt(last_exempt) == [first]
    assert learnt(last_exempt, "last_assistant") == []
    assert learnt([*turns(), ("user", "f")], "last_assistant") == [second.removesuffix("\n<end>")]


def test_markers_that_cannot_be_told_apart_are_refused(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}<end>{% endgeneration %}{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    )
    assert marked(tokenizer, record(TWO_TURNS)) == "<user>a⟦b c<end>⟧<user>d⟦\ne<end>⟧"
    message = refusal(tokenizer, record(TWO_TURNS), "last_assistant")
    assert "some assistant messages are not to be learnt" in message
    assert "markers mark 4 parts for 2 assistant messages" in message


def test_texts_in_parts_are_one_text(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["phi 3"]
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": " c"}]
    in_parts = record([TWO_TURNS[0], {"role": "assistant", "content": parts}, *TWO_TURNS[2:]])
    assert marked(tokenizer, in_parts) == marked(tokenizer, record(TWO_TURNS))


def test_a_template_that_is_not_prefix_preserving_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATES["phi 3"]
    assert refusal(tokenizer, record(TWO_TURNS)).startswith(
        "the chat template is not prefix-preserving: it renders messages 0 to 1 differently when more follow"
    )
    # An answer that ends otherwise when it is not the last: where it ends cannot be told.
    tokenizer.chat_template = TEMPLATES["phi 3"].replace("'<|end|>\n'", "('<|end|>' if loop.last else '\n')")
    assert "not prefix-preserving" in refusal(tokenizer, record(TWO_TURNS))


def test_answers_without_an_end_are_warned_of(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    with pytest.warns(UserWarning, match=r"data\.jsonl:7: the chat template ends an answer without a special token"):
        assert marked(tokenizer, record(TWO_TURNS[:2])) == "<|user|>\na<|assistant|>\n⟦b c⟧"


def test_generation_markers_say_what_is_learnt(tokenizer) -> None:
    messages = [("system", "s"), ("user", "a\n"), ("assistant", "b c"), ("user", "d"), ("assistant", "")]
    by_markers = marked(tokenizer, record(messages))
    assert by_markers == "<bos><user>s<end><user>a\n<end><assistant>⟦b c<end>⟧<user>d<end><assistant>⟦<end>⟧"
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert marked(tokenizer, record(messages)) == by_markers


def test_markers_that_mark_nothing_are_refused(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'bot' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert "marks nothing" in refusal(tokenizer, record(TWO_TURNS))
    assert marked(tokenizer, record(TWO_TURNS[:1])) == "a"


def test_an_assistant_that_begins_needs_markers(tokenizer) -> None:
    begins = record([("assistant", "a"), ("user", "b"), ("assistant", "c")])
    assert marked(tokenizer, begins) == "<bos><assistant>⟦a<end>⟧<user>b<end><assistant>⟦c<end>⟧"
    tokenizer.chat_template = CHATML
    assert refusal(tokenizer, begins).startswith("the conversation begins with the assistant")
    assert marked(tokenizer, begins, "last_assistant").endswith("<|im_start|>assistant\n⟦c<|im_end|>⟧\n")
