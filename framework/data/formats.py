"""The formats of records: which one a record is in, and whether it is a good one.

| format | a record |
| --- | --- |
| `messages` | `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}` |
| `sharegpt` | `{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}` |
| `alpaca` | `{"instruction": "…", "input": "…", "output": "…"}`, perhaps with `system` and `history` |
| `completion` | `{"prompt": "…", "completion": "…"}`, both texts or both lists of messages |
| `text` | `{"text": "…"}` |
| `classification` | `{"text": "…", "label": …}`, perhaps with `"text_pair": "…"`; the label is a name or a number |

Further keys of a record (identifiers, sources) are left alone. `auto` decides by the keys of a file's first record,
so files of different formats can be mixed; `classification` is never recognised, the task asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from framework.data.conversations import check_messages, check_texts, names
from framework.data.dialects import check_alpaca, check_completion, check_sharegpt
from framework.data.readers import type_name
from framework.data.sources import Part
from framework.errors import UserError

REPORTED_PROBLEMS = 10
"""Broken records that are reported together before reading stops."""


@dataclass(frozen=True)
class Record:
    """One validated record and where it stands."""

    place: str
    """`file:line` or `file[row]`, as error messages name it."""
    content: dict[str, Any]


class ProblemList:
    """Collects broken records over all files of a data set, so that they are reported together."""

    def __init__(self, option: str) -> None:
        """`option` is the config key that the files come from."""
        self.option = option
        self.problems: list[str] = []

    def add(self, place: str, problem: str) -> None:
        """Note a problem; raises at once when there are `REPORTED_PROBLEMS`."""
        self.problems.append(f"{place}: {problem}")
        if len(self.problems) == REPORTED_PROBLEMS:
            self.problems.append("(there may be more: reading stopped here)")
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise `UserError` with all problems noted so far, one a line, if there are any."""
        if self.problems:
            raise UserError(f"{self.option}: broken records\n" + "\n".join(f"  {each}" for each in self.problems))


def read_records(part: Part, *, format: str, problems: ProblemList) -> Iterator[tuple[str, Record]]:
    """Yield `(format, record)` for each valid record of `part`; broken ones go to `problems`.

    Args:
        part: A file or split, from `list_parts`.
        format: One of `VALIDATORS`, or `auto`: decided by the keys of the first record. A format that the source of the
            part names goes before it.
        problems: Where broken records are noted; raises `UserError` when they are too many.
    """
    format = part.source.format or format
    for place, content in part.rows():
        if isinstance(content, str):
            problems.add(place, content)
            continue
        if format == "auto":
            recognised = recognise(content)
            if recognised is None:
                problems.add(place, _not_recognised(content))
                return  # without a format, every further record would be broken too
            format = recognised
        problem = VALIDATORS[format](content)
        if problem:
            problems.add(place, problem)
            continue
        yield format, Record(place, content)


def recognise(content: dict[str, Any]) -> str | None:
    """The format of a record by its keys, or `None`."""
    if {"chosen", "rejected"} <= content.keys():
        return None
    if "messages" in content:
        return "sharegpt" if _has_speakers(content["messages"]) else "messages"
    if "conversations" in content or "conversation" in content:
        return "sharegpt"
    if {"instruction", "output"} <= content.keys():
        return "alpaca"  # before `text`: the published data has both, the text being the whole prompt
    if "completion" in content:
        return "completion"
    if "text" in content:
        return "text"
    return None


def _has_speakers(messages: Any) -> bool:
    """Whether a list is one of ShareGPT turns, under the key of another format."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and "from" in first and "role" not in first


def _not_recognised(content: dict[str, Any]) -> str:
    if {"chosen", "rejected"} <= content.keys():
        return (
            "these are pairs of preferences, `chosen` and `rejected`: training on them (DPO and the like) is not done "
            "here; to fine-tune on the chosen answers, write them as `messages` or as `prompt` and `completion`"
        )
    return (
        f"cannot tell the format from the keys {names(content)}: a record has `messages`, `conversations`, "
        "`instruction` and `output`, `prompt` and `completion`, or `text`; rename its keys"
    )


def _check_classification(content: dict[str, Any]) -> str | None:
    problem = check_texts(content, ("text", "text_pair") if "text_pair" in content else ("text",))
    if problem:
        return problem
    if "label" not in content:
        return f"missing key `label` (found {names(content)})"
    label = content["label"]
    if isinstance(label, float):
        return f"`label` must be a class, by its number or name, not {label}: regression is not supported"
    if isinstance(label, bool) or not isinstance(label, int | str):
        return f"`label` must be a class, by its number or name, not {type_name(label)}"
    return None


VALIDATORS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "messages": check_messages,
    "sharegpt": check_sharegpt,
    "alpaca": check_alpaca,
    "completion": check_completion,
    "text": lambda content: check_texts(content, ("text",)),
    "classification": _check_classification,
}
"""For each format the check of one record: what is wrong with it, or `None`."""
