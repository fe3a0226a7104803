"""Chat templates with the structure of published ones, and what is learnt of conversations that they render."""

from __future__ import annotations

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


def with_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, with a token for each special one of the templates."""
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


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
