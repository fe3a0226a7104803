from __future__ import annotations

from pathlib import Path

import pytest

from framework.data.formats import ProblemList, list_files, read_records
from framework.errors import UserError


def read(path: Path, format: str = "auto") -> list[tuple[str, int, dict]]:
    problems = ProblemList("data.train")
    records = [
        (name, record.line, record.content) for name, record in read_records(path, format=format, problems=problems)
    ]
    problems.raise_if_any()
    return records


@pytest.mark.parametrize(
    ("line", "format"),
    [
        ('{"messages": [{"role": "user", "content": "a"}], "id": 1}', "messages"),
        ('{"prompt": "a", "completion": "b"}', "completion"),
        ('{"text": "a"}', "text"),
    ],
)
def test_auto_recognises_the_format_by_the_first_record(tmp_path: Path, line: str, format: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{line}\n\n{line}\n")
    assert [(name, number) for name, number, _ in read(path)] == [(format, 2), (format, 4)]


def test_a_byte_order_mark_and_foreign_line_ends_are_no_part_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('\ufeff{"text": "ä"}\r\n{"text": "b\u2028c"}'.encode())
    assert [content["text"] for _, _, content in read(path)] == ["ä", "b\u2028c"]


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


def test_a_directory_stands_for_its_json_lines_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    other = tmp_path / "c.txt"
    assert list_files([str(other), str(tmp_path)], option="data.train") == [
        other,
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
    ]


def test_missing_paths_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        list_files([str(tmp_path / "none.jsonl"), str(tmp_path)], option="data.eval")
    assert f"data.eval: no such file or directory: {tmp_path / 'none.jsonl'}" in str(error.value)
    assert f"data.eval: the directory {tmp_path} has no *.jsonl file" in str(error.value)
