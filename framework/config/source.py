"""JSON text of a config, with the place of every key, and what `--set` changes in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KeyPath = tuple[str | int, ...]
"""Keys from the top to a value; an element of a list is named by its index, an int."""

OVERRIDE_LINE = math.inf
"""Stands for the line of keys that were set on the command line: after all lines of the file."""

_COLON = re.compile(r"[ \t\r\n]*:")
_DECODER = json.JSONDecoder()
_KINDS = ((str, "the string "), (list, "the list "), (dict, "the object "))


class SourceError(Exception):
    """The text is not the JSON object that a config is; the message says where and why."""


@dataclass
class Source:
    """A config as written.

    Attributes:
        tree: the nested values.
        lines: path of a key or list element -> its line in the file, or `OVERRIDE_LINE`.
        problems: path of a key -> what is wrong with the way it is written.
    """

    tree: dict[str, Any]
    lines: dict[KeyPath, float] = field(default_factory=dict)
    problems: dict[KeyPath, str] = field(default_factory=dict)

    def line(self, key_path: KeyPath) -> float:
        """Line of a key, or of the nearest section around it; 0 where none of them is written."""
        while key_path and key_path not in self.lines:
            key_path = key_path[:-1]
        return self.lines.get(key_path, 0)


def read_source(path: Path) -> Source:
    """Read a config file.

    A key given twice is noted as a problem; the later value stands.

    Raises:
        SourceError: no readable file, not JSON, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SourceError("no such file") from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 text: {error.object[error.start]:#04x} at byte {error.start}") from None
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise SourceError("not a config: nested too deeply") from None
    if not isinstance(tree, dict):
        raise SourceError(f"a config is a JSON object, not {show(tree)}")
    source = Source(tree)
    for key_path, line in _keys(text):
        if key_path in source.lines and isinstance(key_path[-1], str):
            source.problems[key_path] = f"given twice, before in line {source.lines[key_path]}"
        source.lines[key_path] = line
    return source


def apply_override(source: Source, override: str) -> str | None:
    """Apply "section.key=value" to the source in place, and return what is wrong with it, or None.

    The value is taken as JSON, and as a string where it is not JSON. Missing and null sections on the way are created.
    """
    name, equals, text = override.partition("=")
    key_path = tuple(name.strip().split("."))
    if not equals or not all(key_path):
        return f"{json.dumps(override)} is not KEY=VALUE, such as training.max_steps=100"
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    node = source.tree
    for depth, key in enumerate(key_path[:-1], start=1):
        if node.get(key) is None:
            node[key] = {}
            source.lines[key_path[:depth]] = OVERRIDE_LINE
        node = node[key]
        if not isinstance(node, dict):
            return f"{dotted(key_path)}: {dotted(key_path[:depth])} is {show(node)}, which has no keys"
    node[key_path[-1]] = value
    for known in [*source.lines, key_path]:
        if known[: len(key_path)] == key_path:
            source.lines[known] = OVERRIDE_LINE
            source.problems.pop(known, None)
    return None


def dotted(key_path: KeyPath) -> str:
    """A key as messages name it: `data.train[0].path`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key_path)
    return text.removeprefix(".")


def show(value: Any) -> str:
    """A JSON value as a message shows it, with its type where that is not obvious, cut if long."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "") + text


def non_finite(value: Any, key_path: KeyPath = ()) -> Iterator[tuple[KeyPath, float]]:
    """Yield the path and value of every number in nested JSON values that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key_path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from non_finite(item, (*key_path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from non_finite(item, (*key_path, index))


def _keys(text: str) -> Iterator[tuple[KeyPath, int]]:
    """Yield the path and line of every object key and list element of a valid JSON text."""
    # The key or index of the value being read, for each bracket that is open; an index is an int.
    open_values: list[str | int] = []
    position, line, element_due = 0, 1, False
    while position < len(text):
        character = text[position]
        position += 1
        if element_due and character not in " \t\r\n":
            element_due = False
            if character != "]":
                yield tuple(open_values), line
        if character == '"':
            string, position = _DECODER.raw_decode(text, position - 1)
            if _COLON.match(text, position):
                open_values[-1] = string
                yield tuple(open_values), line
        elif character == "{":
            open_values.append("")
        elif character == "[":
            open_values.append(0)
            element_due = True
        elif character in "}]":
            open_values.pop()
        elif character == "," and isinstance(index := open_values[-1], int):
            open_values[-1] = index + 1
            element_due = True
        elif character == "\n":
            line += 1
