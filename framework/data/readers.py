"""Reading files record by record, whatever their kind: no more of a file is held than the record at hand.

A record comes with its place: `file:line` in JSON texts with a record a line, else `file[index]`, counted from 0.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from framework.errors import UserError

Row = tuple[str, dict[str, Any] | str]
"""Place of a record, and the record or, as a text, what is wrong with it."""

PIECE = 1 << 20
"""Characters of a JSON document that are read at a time, more where one value is longer."""

_CUT_OFF = 16
"""Characters from the end within which an error can come from a value that goes on in the next piece."""

_DELIMITERS = tuple(" \t\r\n,]}")
_DECODER = json.JSONDecoder()
_DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: _open_zstd(path),
}


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of its compression; None if it is not known."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _DECOMPRESSORS:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in _TEXTS else None
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_json_lines(path: Path) -> Iterator[Row]:
    """Records of a file with a JSON object a line, in UTF-8; blank lines are skipped."""
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_line(line, first=number == 1)


def read_json(path: Path) -> Iterator[Row]:
    """Records of a JSON document: of a list, of the list under `data` in an object, or objects one after the other.

    After a syntax error there is no further record: where the next one begins is not known.
    """
    with _open(path) as stream:
        text = _JsonText(io.TextIOWrapper(stream, encoding="utf-8-sig"))
        try:
            if text.peek() == "[":
                yield from _elements(path, text)
                text.check_end()
                return
            while text.peek():
                place = f"{path}:{text.line}"
                if text.peek() != "{":
                    yield place, f"a record must be an object, not {type_name(text.value())}"
                    return
                record, is_record = {}, True
                for key in _members(text):
                    if key == "data" and text.peek() == "[":
                        yield from _elements(path, text)
                        is_record = False
                    else:
                        record[key] = text.value()
                if not is_record:
                    text.check_end()
                    return
                yield place, _checked(record)
        except _BadText as error:
            yield f"{path}:{error.line}", error.problem


def read_table(builder: str, **options: Any) -> Callable[[Path], Iterator[Row]]:
    """A reader of files with rows and columns, by one of the builders that come with `datasets`, such as "parquet"."""

    def read(path: Path) -> Iterator[Row]:
        import datasets

        try:
            data_files = [glob.escape(str(path))]  # `datasets` takes a path for a pattern
            rows = datasets.load_dataset(builder, data_files=data_files, split="train", streaming=True, **options)
            yield from read_rows(str(path), rows)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise UserError(f"{path}: cannot be read as {builder}: {first_line(error)}") from error

    return read


def read_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Records of a `datasets.Dataset`, without nulls.

    Arrow tables give every record of a column, nested ones too, the keys of all: a null is a key that is not there.
    """
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", _without_nulls(row)


def first_line(error: BaseException) -> str:
    """What an exception says in its first line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def type_name(value: Any) -> str:
    """JSON's name for the type of `value`."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_table("parquet"),
    ".arrow": read_table("arrow"),
    ".csv": read_table("csv"),
    ".tsv": read_table("csv", sep="\t"),
    ".txt": read_table("text"),
}
"""For each suffix the function that reads such a file."""

_TEXTS = (".jsonl", ".ndjson", ".json")
"""Suffixes that may be followed by one of a compression."""


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed; what goes wrong in reading them is a `UserError`."""
    try:
        with _DECOMPRESSORS.get(path.suffix, lambda path: path.open("rb"))(path) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))


def _parse_line(line: bytes, *, first: bool) -> dict[str, Any] | str:
    """The record in `line`, or what is wrong with it."""
    try:
        content = json.loads(line.rstrip().decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    except json.JSONDecodeError as error:
        return f"bad JSON: {error.msg} (column {error.colno})"
    except ValueError as error:
        return f"bad JSON: {_too_many_digits(error)}"
    except RecursionError:
        return "bad JSON: nested too deeply"
    return _checked(content, suspicious=b"\\ud" in line.lower())


def _too_many_digits(error: ValueError) -> str:
    """What Python says of an integer that is longer than `sys.get_int_max_str_digits`, without advice on its code."""
    return first_line(error).partition(";")[0]


def _checked(content: Any, *, suspicious: bool = True) -> dict[str, Any] | str:
    """A record, or what is wrong with a value in its place; texts are looked through if they are `suspicious`."""
    if not isinstance(content, dict):
        return f"a record must be an object, not {type_name(content)}"
    # JSON can escape half of a surrogate pair, which no tokenizer takes.
    if suspicious and any("\ud800" <= character <= "\udfff" for character in _all_text(content)):
        return "bad JSON: a text contains an unpaired surrogate (\\ud800 to \\udfff), which is not a character"
    return content


def _all_text(value: Any) -> str:
    """All text in a JSON value, run together."""
    if isinstance(value, dict):
        return "".join(str(key) + _all_text(each) for key, each in value.items())
    if isinstance(value, list):
        return "".join(_all_text(each) for each in value)
    return value if isinstance(value, str) else ""


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


class _BadText(Exception):
    """A JSON document that cannot be read on."""

    def __init__(self, line: int, problem: str) -> None:
        self.line = line
        self.problem = problem


class _JsonText:
    """A JSON document that is read in pieces and decoded value by value."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self._text = ""
        self._position = 0
        self._lines_before = 0  # in what is forgotten and in the text up to `_counted`
        self._counted = 0
        self._complete = False

    @property
    def line(self) -> int:
        """The line of the next character, counted from 1."""
        line = self._line_of(self._position)
        self._lines_before, self._counted = line - 1, self._position
        return line

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._text) or self._complete:
                return self._text[self._position : self._position + 1]
            self._read_on()

    def skip(self, *expected: str) -> str:
        """Go past the next character that is not blank, which must be one of those expected, and return it."""
        found = self.peek()
        if found not in expected or not found:
            wanted = " or ".join(f"'{each}'" for each in expected)
            raise _BadText(self.line, f"bad JSON: expected {wanted}, found {repr(found) if found else 'the end'}")
        self._position += 1
        return found

    def check_end(self) -> None:
        """Make sure that nothing follows, which would be lost."""
        if found := self.peek():
            raise _BadText(self.line, f"bad JSON: expected the end, found {found!r}; a file holds one list of records")

    def value(self) -> Any:
        """Decode the next value and go past it."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                cut_off = error.pos > len(self._text) - _CUT_OFF or error.msg.startswith("Unterminated string")
                if self._complete or not cut_off:
                    raise _BadText(self._line_of(error.pos), f"bad JSON: {error.msg}") from None
            except ValueError as error:
                raise _BadText(self.line, f"bad JSON: {_too_many_digits(error)}") from None
            except RecursionError:
                raise _BadText(self.line, "bad JSON: nested too deeply") from None
            else:
                following = self._text[end : end + 1]
                # A number, and only a number, may go on in the next piece.
                if self._complete or following in _DELIMITERS or (following and not isinstance(value, int | float)):
                    self._position = end
                    return value
            self._read_on()

    def _line_of(self, position: int) -> int:
        return 1 + self._lines_before + self._text.count("\n", self._counted, position)

    def _read_on(self) -> None:
        """Forget what was decoded and read as much again as is left, so that long values take few attempts."""
        rest = self._text[self._position :]
        try:
            piece = self._stream.read(max(PIECE, len(rest)))
        except UnicodeDecodeError as error:
            raise _BadText(self._line_of(len(self._text)), f"not UTF-8 from here on ({error.reason})") from None
        self._complete = not piece
        self._lines_before += self._text.count("\n", self._counted, self._position)
        self._text = rest + piece
        self._position = self._counted = 0


def _elements(path: Path, text: _JsonText) -> Iterator[Row]:
    """The records of the list that comes next."""
    text.skip("[")
    index = 0
    while text.peek() != "]":
        yield f"{path}[{index}]", _checked(text.value())
        index += 1
        if text.peek() != "]":
            text.skip(",", "]")
    text.skip("]")


def _members(text: _JsonText) -> Iterator[str]:
    """The keys of the object that comes next; the caller takes the value of each before the next key."""
    text.skip("{")
    while text.peek() != "}":
        if text.peek() != '"':
            text.skip('"')
        key = text.value()
        text.skip(":")
        yield key
        if text.peek() != "}":
            text.skip(",", "}")
    text.skip("}")
