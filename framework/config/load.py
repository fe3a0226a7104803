"""Reading a config: from JSON text and overrides to a `Config`, or to the list of everything that is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from framework.config.describe import Schema, describe, known_keys, known_path, unknown_key
from framework.config.rules import broken_rules
from framework.config.schema import Config
from framework.config.sections import Section
from framework.config.source import (
    OVERRIDE_LINE,
    KeyPath,
    Source,
    SourceError,
    apply_override,
    dotted,
    non_finite,
    read_source,
    show,
)
from framework.errors import UserError


class ConfigError(UserError):
    """A config that cannot be used; the message lists everything that is wrong with it.

    Attributes:
        problems: one line each, with place, key and problem.
    """

    def __init__(self, path: str | os.PathLike[str], problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        if len(problems) == 1:
            super().__init__(f"{os.fspath(path)}: {problems[0]}")
        else:
            super().__init__("\n  ".join([f"{os.fspath(path)}: {len(problems)} problems", *problems]))


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read and check a config.

    Args:
        path: a JSON file.
        overrides: "section.key=value", applied in order over the file's values; a value is JSON, else a string.

    Raises:
        ConfigError: the file cannot be read, or at least one key is unknown, missing or wrong; all are listed.
    """
    try:
        source = read_source(Path(path))
    except SourceError as error:
        raise ConfigError(path, [str(error)]) from None
    bad_overrides = [problem for override in overrides if (problem := apply_override(source, override))]
    # A missing section is read as an empty one, so that each of its missing keys is named.
    for section in Config.model_fields:
        source.tree.setdefault(section, {})
    config, problems = _validate(source)
    if config is None or problems or bad_overrides:
        ordered = sorted(problems.items(), key=lambda problem: source.line(problem[0]))
        lines = [_line(source, key_path, message) for key_path, message in ordered]
        raise ConfigError(path, [*lines, *(f"--set: {problem}" for problem in bad_overrides)])
    return config


def _line(source: Source, key_path: KeyPath, message: str) -> str:
    line = source.line(key_path)
    place = "--set: " if line == OVERRIDE_LINE else f"line {line}: " if line else ""
    return f"{place}{dotted(key_path) or 'config'}: {message}"


def _validate(source: Source) -> tuple[Config | None, dict[KeyPath, str]]:
    problems = dict(source.problems)
    for key_path, value in non_finite(source.tree):
        problems.setdefault(key_path, f"{json.dumps(value)} is not a finite number")
    try:
        # Lists stand for tuples in JSON only, and strictness is that of JSON's types.
        return Config.model_validate_json(json.dumps(source.tree)), problems
    except ValidationError as error:
        known = known_keys(Config.model_json_schema())
        findings: dict[KeyPath, str] = {}
        unknown_in = set()
        for finding in error.errors(include_url=False, include_input=False, include_context=False):
            key_path = _named(finding["loc"], known)
            if finding["type"] == "extra_forbidden":
                unknown_in.add(key_path)
                key_path = (*key_path, str(finding["loc"][-1]))
                findings[key_path] = unknown_key(key_path, known)
            elif not finding["loc"]:
                # A broken rule, which is run again below, or text that JSON allows but Unicode does not.
                if finding["type"] != "value_error":
                    problems[()] = finding["msg"]
            else:
                findings[key_path] = _expectation(source, key_path, known[known_path(key_path)])
        for key_path, message in findings.items():
            # What is wrong inside a list or an object says it all: that it is no string either is noise.
            if not any(inner != key_path and inner[: len(key_path)] == key_path for inner in findings):
                problems.setdefault(key_path, message)

    def value_of(*key_path: str) -> Any:
        if any(bad[: len(key_path)] == key_path or key_path[: len(bad)] == bad for bad in problems if bad):
            raise LookupError(f"{'.'.join(key_path)} is not valid")
        value: Any = source.tree
        section: type[Section] | None = Config
        for depth, key in enumerate(key_path):
            if value is None:
                return None
            if key not in value and key_path[:depth] in unknown_in:
                raise LookupError(f"{'.'.join(key_path)} may be meant by an unknown key")
            assert section is not None
            field = section.model_fields[key]
            value, section = value.get(key, field.default), _section_of(field.annotation)
        return value

    for name, message in broken_rules(value_of):
        problems.setdefault(tuple(name.split(".")), message)
    return None, problems


def _section_of(annotation: Any) -> type[Section] | None:
    """The section among the types that a key takes, or None if its value is none."""
    options = get_args(annotation) or (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def _named(location: tuple[int | str, ...], known: dict[KeyPath, Schema]) -> KeyPath:
    """The known key that a finding is about: pydantic's location without the names of members of unions."""
    key_path: KeyPath = ()
    for part in location:
        if known_path((*key_path, part)) in known:
            key_path = (*key_path, part)
    return key_path


def _expectation(source: Source, key_path: KeyPath, schema: Schema) -> str:
    section, key = _get(source.tree, key_path[:-1]), key_path[-1]
    if isinstance(section, list) or (isinstance(section, dict) and key in section):
        return f"expected {describe(schema)}, got {show(_get(section, (key,)))}"
    return f"missing, expected {describe(schema)}"


def _get(tree: Any, key_path: KeyPath) -> Any:
    """The value of a key, or None where there is none."""
    for key in key_path:
        if isinstance(tree, list) and isinstance(key, int):
            tree = tree[key]
        else:
            tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
