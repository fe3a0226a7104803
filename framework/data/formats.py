"""Reading data files: JSON lines in the formats `messages`, `completion` and `text`, every record validated.

| format | a record |
| --- | --- |
| `messages` | `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}` |
| `completion` | `{"prompt": "…", "completion": "…"}` |
| `text` | `{"text": "…"}` |

Further keys of a record (identifiers, sources) are left alone. `auto` decides by the keys of a file's first record,
so files of different formats can be mixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.errors import UserError

REPORTED_PROBLEMS = 10
"""Broken lines that are reported together before reading stops."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a message may have. What a chat template makes of them is the template's business."""


@dataclass(frozen=True)
class Record:
    """One validated record and where it stands."""

    path: Path
    line: int
    """Counted from 1."""
    content: dict[str, Any]

    @property
    def place(self) -> str:
        """`file:line`, as error messages name it."""
        return f"{self.path}:{self.line}"


def list_files(paths: str | Path | Sequence[str | Path], *, option: str) -> list[Path]:
    """Files behind `paths`, in the given order; a directory stands for its `*.jsonl` files, sorted by name.

    Args:
        paths: A file, a directory, or a list of them.
        option: The config key that `paths` comes from, for error messages.

    Raises:
        UserError: A path does not exist, a directory holds no `*.jsonl` file, or there is no path at all.
    """
    files: list[Path] = []
    problems = []
    for named in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(named).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            if not found:
                problems.append(f"{option}: the directory {path} has no *.jsonl file")
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            problems.append(f"{option}: no such file or directory: {path}")
    if problems:
        raise UserError("\n".join(problems))
    if not files:
        raise UserError(f"{option}: no data file is named; give a JSON lines file, a directory, or a list of them")
    return files


class ProblemList:
    """Collects broken lines over all files of a data set, so that they are reported together."""

    def __init__(self, option: str) -> None:
        """`option` is the config key that the files come from."""
        self.option = option
        self.problems: list[str] = []

    def add(self, path: Path, line: int, problem: str) -> None:
        """Note a problem; raises at once when there are `REPORTED_PROBLEMS`."""
        self.problems.append(f"{path}:{line}: {problem}")
        if len(self.problems) == REPORTED_PROBLEMS:
            self.problems.append("(there may be more: reading stopped here)")
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise `UserError` with all problems noted so far, one a line, if there are any."""
        if self.problems:
            raise UserError(f"{self.option}: broken records\n" + "\n".join(f"  {each}" for each in self.problems))


def read_records(path: Path, *, format: str, problems: ProblemList) -> Iterator[tuple[str, Record]]:
    """Yield `(format, record)` for each valid line of `path`; broken ones go to `problems`. Blank lines are skipped.

    Args:
        path: A JSON lines file in UTF-8.
        format: `messages`, `completion`, `text`, or `auto`: decided by the keys of the first record.
        problems: Where broken lines are noted; raises `UserError` when they are too many.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            content = _parse(line, first=number == 1)
            if isinstance(content, str):
                problems.add(path, number, content)
                continue
            if format == "auto":
                recognised = recognise(content)
                if recognised is None:
                    problems.add(
                        path,
                        number,
                        f"cannot tell the format from the keys {_names(content)}: a record has `messages`, "
                        "`prompt` and `completion`, or `text`",
                    )
                    return  # without a format, every further line would be broken too
                format = recognised
            problem = VALIDATORS[format](content)
            if problem:
                problems.add(path, number, problem)
                continue
            yield format, Record(path, number, content)


def recognise(content: dict[str, Any]) -> str | None:
    """The format of a record by its keys, or `None`."""
    if "messages" in content:
        return "messages"
    if "completion" in content:
        return "completion"
    if "text" in content:
        return "text"
    return None


def _parse(line: bytes, *, first: bool) -> dict[str, Any] | str:
    """The record in `line`, or what is wrong with it."""
    try:
        content = json.loads(line.rstrip().decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    except json.JSONDecodeError as error:
        return f"bad JSON: {error.msg} (column {error.colno})"
    except RecursionError:
        return "bad JSON: nested too deeply"
    if not isinstance(content, dict):
        return f"a record must be an object, not {_type(content)}"
    # JSON can escape half of a surrogate pair, which no tokenizer takes.
    if b"\\ud" in line.lower() and any("\ud800" <= character <= "\udfff" for character in _all_text(content)):
        return "bad JSON: a text contains an unpaired surrogate (\\ud800 to \\udfff), which is not a character"
    return content


def _all_text(value: Any) -> str:
    """All text in a JSON value, run together."""
    if isinstance(value, dict):
        return "".join(str(key) + _all_text(each) for key, each in value.items())
    if isinstance(value, list):
        return "".join(_all_text(each) for each in value)
    return value if isinstance(value, str) else ""


def _type(value: Any) -> str:
    """JSON's name for the type of `value`."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _names(content: dict[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in content) or "(none)"


def _check_texts(content: dict[str, Any], keys: Sequence[str], where: str = "") -> str | None:
    for key in keys:
        if key not in content:
            return f"{where}missing key `{key}` (found {_names(content)})"
        if not isinstance(content[key], str):
            return f"{where}`{key}` must be a text, not {_type(content[key])}"
    return None


def _check_messages(content: dict[str, Any]) -> str | None:
    if "messages" not in content:
        return f"missing key `messages` (found {_names(content)})"
    messages = content["messages"]
    if not isinstance(messages, list):
        return f"`messages` must be a list, not {_type(messages)}"
    if not messages:
        return "`messages` is empty"
    for index, message in enumerate(messages):
        where = f"messages[{index}]: "
        if not isinstance(message, dict):
            return f"{where}must be an object with `role` and `content`, not {_type(message)}"
        problem = _check_texts(message, ("role", "content"), where)
        if problem:
            return problem
        if message["role"] not in ROLES:
            return f"{where}unknown role {message['role']!r}; known: {', '.join(ROLES)}"
    return None


VALIDATORS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "messages": _check_messages,
    "completion": lambda content: _check_texts(content, ("prompt", "completion")),
    "text": lambda content: _check_texts(content, ("text",)),
}
"""For each format the check of one record: what is wrong with it, or `None`."""
