"""Files of every kind give the same records, and their places."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest

from framework.data import readers
from framework.data.readers import READERS, kind_of
from framework.errors import UserError

RECORDS = [{"text": "ä\n"}, {"text": "b", "more": {"a": [1, None]}}, {"text": ""}]


def rows(path: Path) -> list[tuple[str, dict | str]]:
    kind = kind_of(path)
    assert kind is not None
    return [(place.removeprefix(str(path)), content) for place, content in READERS[kind](path)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lines_are_named_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n" + "".join(json.dumps(each) + "\n\n" for each in RECORDS))
    assert rows(path) == [(":2", RECORDS[0]), (":4", RECORDS[1]), (":6", RECORDS[2])]


def test_a_byte_order_mark_and_foreign_line_ends_are_no_part_of_a_record(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        path = tmp_path / name
        path.write_bytes('\ufeff{"text": "ä"}\r\n{"text": "b\u2028c"}'.encode())
        assert rows(path) == [(":1", {"text": "ä"}), (":2", {"text": "b\u2028c"})]


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_json_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(readers, "PIECE", piece)
    numbered = [(f"[{index}]", record) for index, record in enumerate(RECORDS)]
    for indent in (None, 2):
        text = json.dumps(RECORDS, indent=indent)
        assert rows(write(tmp_path / "list.json", text)) == numbered
        inside = json.dumps({"version": 1.5, "notes": ["a"], "data": RECORDS, "end": 0}, indent=indent)
        assert rows(write(tmp_path / "inside.json", inside)) == numbered
    lines = "".join(json.dumps(each) + "\n" for each in RECORDS)
    assert rows(write(tmp_path / "lines.json", lines)) == [(f":{1 + i}", each) for i, each in enumerate(RECORDS)]
    pretty = "\n".join(json.dumps(each, indent=1) for each in RECORDS[:2])
    assert rows(write(tmp_path / "pretty.json", pretty)) == [(":1", RECORDS[0]), (":4", RECORDS[1])]
    assert rows(write(tmp_path / "none.json", " \n")) == rows(write(tmp_path / "empty.json", "[]")) == []


def test_a_json_document_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE", 1000)
    path = write(tmp_path / "long.json", json.dumps([{"text": "x" * 90}] * 1000))
    held = []
    read_on = readers._JsonText._read_on

    def watched(text: readers._JsonText) -> None:
        read_on(text)
        held.append(len(text._text))

    monkeypatch.setattr(readers._JsonText, "_read_on", watched)
    assert len(rows(path)) == 1000
    assert max(held) < 1200 < len(held) * 100


@pytest.mark.parametrize("piece", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]', ":3", "bad JSON: Expecting ':' delimiter"),
        ('[{"text": "a"},\n {"text": "b"}', ":2", "bad JSON: expected ',' or ']', found the end"),
        ('[{"text": "a"}\n {"text": "b"}]', ":2", "bad JSON: expected ',' or ']', found '{'"),
        ('[\n{"text": "a', ":2", "bad JSON: Unterminated string starting at"),
        ('{"text": "a"\n"b": 1}', ":2", "bad JSON: expected ',' or '}', found '\"'"),
        ("{'text': 1}", ":1", "bad JSON: expected '\"', found \"'\""),
        ('["a", {"text": "b"}]', "[0]", "a record must be an object, not a text"),
        ("7", ":1", "a record must be an object, not a number"),
        ('[{"text": "\\ud83c"}]', "[0]", "bad JSON: a text contains an unpaired surrogate"),
        ("[" * 100_000, ":1", "bad JSON: nested too deeply"),
        ('[{"text": "a"}]\n[{"text": "b"}]', ":2", "bad JSON: expected the end, found '['"),
        ('{"data": [{"text": "a"}]}\n{"data": []}', ":2", "bad JSON: expected the end, found '{'"),
        ('{"data": [{"text": "a"}]', ":1", "bad JSON: expected ',' or '}', found the end"),
    ],
)
def test_a_broken_document_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, place: str, problem: str, piece: int
) -> None:
    monkeypatch.setattr(readers, "PIECE", piece)
    found = [(place, content) for place, content in rows(write(tmp_path / "a.json", text)) if isinstance(content, str)]
    assert found[0][0] == place
    assert found[0][1].startswith(problem)
    assert len(found) == 1


def test_a_document_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "\xff"}]')
    ((_, problem),) = rows(path)
    assert problem == "not UTF-8 from here on (invalid start byte)"


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pyarrow.compress(data, codec="zstd", asbytes=True)),
    ],
)
def test_compressed_texts(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(compress("".join(json.dumps(each) + "\n" for each in RECORDS).encode()))
    assert rows(lines) == [(f":{1 + index}", each) for index, each in enumerate(RECORDS)]
    document = tmp_path / f"a.json{suffix}"
    document.write_bytes(compress(json.dumps(RECORDS).encode()))
    assert rows(document) == [(f"[{index}]", each) for index, each in enumerate(RECORDS)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", lambda data: data)],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"{name}{suffix}"
    whole = compress("".join(json.dumps(each) + "\n" for each in RECORDS).encode())
    for content in (b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: cannot be read: "):
            rows(path)


def test_tables_are_read_row_by_row_without_nulls(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]},
            {"messages": [{"role": "user", "content": "c", "name": "n"}], "source": "s"},
        ]
    )
    table.to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [
        ("[0]", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("[1]", {"messages": [{"role": "user", "content": "c", "name": "n"}]}),
    ]
    write(tmp_path / "a.csv", 'prompt,completion\na,"b\nc"\nd,\n')
    assert rows(tmp_path / "a.csv") == [("[0]", {"prompt": "a", "completion": "b\nc"}), ("[1]", {"prompt": "d"})]
    write(tmp_path / "a.tsv", "text\tn\na\t1\n")
    assert rows(tmp_path / "a.tsv") == [("[0]", {"text": "a", "n": 1})]
    write(tmp_path / "a.txt", "a\nb\n")
    assert rows(tmp_path / "a.txt") == [("[0]", {"text": "a"}), ("[1]", {"text": "b"})]


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", "not a table")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet: "):
        rows(path)


def test_kinds_of_files() -> None:
    for name, kind in {
        "a.jsonl": ".jsonl",
        "a.b.json": ".json",
        "a.jsonl.gz": ".jsonl",
        "train-00000-of-00001.parquet": ".parquet",
        "a.parquet.gz": None,
        "a.gz": None,
        "jsonl": None,
        "a.md": None,
    }.items():
        assert kind_of(Path("some.jsonl/dir") / name) == kind, name


@pytest.mark.slow
def test_json_is_read_without_the_datasets_library(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "a.json", '[{"text": "a"}]')
    program = f"""
import sys
from framework.data.formats import ProblemList, read_records
from framework.data.sources import list_parts
for part in list_parts([{str(tmp_path / "a.jsonl")!r}, {str(tmp_path / "a.json")!r}], option="data.train"):
    assert [format for format, _ in read_records(part, format="auto", problems=ProblemList("data.train"))] == ["text"]
assert "datasets" not in sys.modules
assert "pyarrow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["x[1]", "x*", "x?", "x**", "x[!a]"])
def test_a_name_of_a_table_is_no_pattern(tmp_path: Path, name: str) -> None:
    for each in (name, "x1", "xy", "x*y"):
        write(tmp_path / f"{each}.csv", f"text\n{each}\n")
    assert rows(tmp_path / f"{name}.csv") == [("[0]", {"text": name})]
    inside = tmp_path / name
    inside.mkdir()
    (tmp_path / "x1").mkdir()
    write(tmp_path / "x1" / "a.csv", "text\nother\n")
    assert rows(write(inside / "a.csv", "text\nown\n")) == [("[0]", {"text": "own"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_an_integer_of_more_digits_than_python_reads_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '{"text": "a"}\n{"id": ' + "9" * 5000 + ', "text": "b"}\n')
    assert rows(path) == [
        (":1", {"text": "a"}),
        (":2", "bad JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"),
    ]


def test_an_integer_of_many_digits_in_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"text": "a"},\n{"id": ' + "9" * 5000 + "}]")
    ((place, problem),) = rows(path)[1:]
    assert place == ":2" and str(problem).startswith("bad JSON: Exceeds the limit (4300 digits)")
