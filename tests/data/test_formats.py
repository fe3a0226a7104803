from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.config import SourceConfig
from framework.data.formats import ProblemList, read_records
from framework.data.sources import list_parts
from framework.errors import UserError


def read(path: Path, format: str = "auto", own_format: str | None = None) -> list[tuple[str, str, dict]]:
    problems = ProblemList("data.train")
    (part,) = list_parts(SourceConfig(path=str(path), format=own_format), option="data.train")
    records = [
        (name, record.place, record.content) for name, record in read_records(part, format=format, problems=problems)
    ]
    problems.raise_if_any()
    return records


@pytest.mark.parametrize(
    ("line", "format"),
    [
        ('{"messages": [{"role": "user", "content": "a"}], "id": 1}', "messages"),
        ('{"messages": [{"from": "human", "value": "a"}]}', "sharegpt"),
        ('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}', "sharegpt"),
        ('{"conversation": [{"role": "user", "content": "a"}]}', "sharegpt"),
        ('{"instruction": "a", "input": "", "output": "b", "text": "ab"}', "alpaca"),
        ('{"prompt": "a", "completion": "b"}', "completion"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}',
            "completion",
        ),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "messages"),
        ('{"text": "a"}', "text"),
    ],
)
def test_auto_recognises_the_format_by_the_first_record(tmp_path: Path, line: str, format: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{line}\n\n{line}\n")
    assert [(name, place) for name, place, _ in read(path)] == [(format, f"{path}:2"), (format, f"{path}:4")]


def test_a_source_names_its_own_format(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "prompt": "b", "completion": "c"}')
    assert [name for name, _, _ in read(path)] == ["completion"]
    assert [name for name, _, _ in read(path, "completion", "text")] == ["text"]
    assert [name for name, _, _ in read(path, "text", "auto")] == ["completion"]
    assert [name for name, _, _ in read(path, "text")] == ["text"]


def said(**assistant) -> dict:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"} | assistant]}


def turns(*speakers: str, **further) -> dict:
    return {"conversations": [{"from": speaker, "value": "{}"} for speaker in speakers], **further}


BROKEN = [
    ("messages", said(content=None), "messages[1]: `content` must be a text, not null"),
    ("messages", said(tool_calls=[]), "messages[1]: missing key `content` (found `role`, `tool_calls`)"),
    ("messages", said(tool_calls={}, content=3), "messages[1]: `content` must be a text, not a number"),
    ("messages", said(tool_calls={"name": "f"}), "messages[1]: tool_calls: must be a list, not an object"),
    (
        "messages",
        said(tool_calls=[{"function": {}}]),
        "messages[1]: tool_calls: [0] must be an object with `name` and `arguments`, perhaps under `function`",
    ),
    (
        "messages",
        said(tool_calls=[{"name": "f", "arguments": "x=1"}]),
        "messages[1]: tool_calls: [0]: `arguments` must be an object, or one as JSON text, not a text",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]},
        "messages[0]: only the assistant calls tools, not the user",
    ),
    (
        "messages",
        said(content=[{"type": "text", "text": "a"}, {"type": "image", "url": "b"}]),
        "messages[1]: content[1]: only texts are trained on",
    ),
    ("messages", said(content="b", train=1), "messages[1]: `train` must be true or false, not a number"),
    (
        "messages",
        said(content="b", weight=0.5),
        "messages[1]: `weight` must be 0 or 1, not 0.5: all labels count the same in the loss",
    ),
    ("messages", said(content="b", weight=True), "messages[1]: `weight` must be 0 or 1, not true"),
    ("messages", said(content="b", weight=1, train=False), "messages[1]: `train` false contradicts `weight` 1"),
    (
        "messages",
        {"messages": [{"role": "user", "content": "a", "train": True}]},
        "messages[0]: only what the assistant says is learnt, but this message of the user asks to be",
    ),
    ("messages", said(content="b") | {"tools": "f"}, "`tools` must be a list, or one as JSON text, not a text"),
    ("messages", said(content="b") | {"tools": [{"type": "function"}]}, "tools[0] must describe a function"),
    ("messages", said(content="b") | {"chat_template_kwargs": [1]}, "`chat_template_kwargs` must be an object"),
    ("sharegpt", {"text": "a"}, "missing key `conversations` (found `text`)"),
    ("sharegpt", {"conversations": []}, "`conversations` is empty"),
    ("sharegpt", {"conversation": "a"}, "`conversation` must be a list, not a text"),
    ("sharegpt", {"conversations": ["a"]}, "conversations[0]: must be an object with `from` and `value`, not a text"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "text": "a"}]},
        "conversations[0]: needs `from` and `value`, or `role` and `content` (found `from`, `text`)",
    ),
    ("sharegpt", turns("human", "alice"), "conversations[1]: unknown speaker 'alice'; known: human, user, gpt, "),
    (
        "sharegpt",
        turns("system", "human", "gpt", "gpt"),
        "conversations[3]: two turns of the assistant in a row, of which one is missing or wrong",
    ),
    ("sharegpt", turns("human", "user"), "conversations[1]: two turns of the user in a row"),
    ("sharegpt", turns("human", "gpt", "system"), "conversations[2]: a system turn stands at the beginning only"),
    (
        "sharegpt",
        turns("human", "function_call"),
        "conversations[1]: `function_call` must hold a call as JSON, an object with `name` and `arguments`: [0]",
    ),
    ("sharegpt", turns("system", "human", system="s"), "the system's text stands twice, under `system` and in"),
    ("sharegpt", turns("human", system=1), "`system` must be a text, not a number"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": 1}], "system": "s"},
        "conversations[0]: `content` must be a text, not a number",
    ),
    ("alpaca", {"instruction": "a"}, "missing key `output` (found `instruction`"),
    ("alpaca", {"instruction": "a", "output": "b", "input": 1}, "`input` must be a text, not a number"),
    ("alpaca", {"instruction": "a", "output": None}, "`output` must be a text, not null"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "`history` must be a list of pairs of texts"),
    (
        "completion",
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
        "`prompt` and `completion` must both be texts, or both lists of messages",
    ),
    ("completion", {"prompt": [], "completion": []}, "`prompt` is empty"),
    (
        "completion",
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant"}]},
        "completion[0]: missing key `content` (found `role`)",
    ),
]


@pytest.mark.parametrize(
    ("format", "line", "problem"),
    [
        ("text", b'{"text": "a"', "bad JSON: Expecting ',' delimiter (column 13)"),
        ("text", b'{"text": "\xff"}', "not UTF-8 (byte 11 of the line)"),
        ("text", b'["a"]', "a record must be an object, not a list"),
        ("text", b'{"test": "a"}', "missing key `text` (found `test`)"),
        ("text", b'{"text": null}', "`text` must be a text, not null"),
        ("text", b'{"text": "\\ud800"}', "bad JSON: a text contains an unpaired surrogate"),
        ("completion", b'{"prompt": "a"}', "missing key `completion` (found `prompt`)"),
        ("completion", b'{"prompt": 3, "completion": "a"}', "`prompt` must be a text, not a number"),
        ("messages", b'{"text": "a"}', "missing key `messages` (found `text`)"),
        ("messages", b'{"messages": "a"}', "`messages` must be a list, not a text"),
        ("messages", b'{"messages": []}', "`messages` is empty"),
        ("messages", b'{"messages": ["a"]}', "messages[0]: must be an object with `role` and `content`, not a text"),
        ("messages", b'{"messages": [{"role": "user"}]}', "messages[0]: missing key `content` (found `role`)"),
        (
            "messages",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}',
            "messages[1]: unknown role 'bot'; known: system, developer, user, assistant, tool",
        ),
        ("auto", b'{"question": "a", "answer": "b"}', "cannot tell the format from the keys `question`, `answer`"),
        ("auto", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "these are pairs of preferences, `chosen` and"),
        ("auto", b'{"chosen": [], "rejected": [], "messages": []}', "these are pairs of preferences, `chosen` and"),
        ("auto", b'{"prompt": "a", "completion": "b", "label": false}', "`label` says whether the completion is want"),
        *((format, json.dumps(record).encode(), problem) for format, record, problem in BROKEN),
    ],
)
def test_a_broken_line_is_named_with_its_file_and_number(
    tmp_path: Path, format: str, line: bytes, problem: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(UserError) as error:
        read(path, format)
    assert f"{path}:2: {problem}" in str(error.value)
    assert str(error.value).startswith("data.train: ")


def test_a_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "\\ud83c\\udf89"}')
    assert read(path)[0][2] == {"text": "🎉"}


def test_broken_lines_are_reported_together_up_to_ten(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n' + '{"text": 1}\n{"text": "good"}\n' * 3)
    with pytest.raises(UserError) as error:
        read(path)
    assert [line.split(":")[1] for line in str(error.value).splitlines()[1:]] == ["2", "4", "6"]

    path.write_text('{"text": "good"}\n' + '{"text": 1}\n' * 20)
    with pytest.raises(UserError) as error:
        read(path)
    assert len(str(error.value).splitlines()) == 1 + 10 + 1
