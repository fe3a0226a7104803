"""Words for what a key accepts, from its JSON schema, and for the key that was probably meant."""

from __future__ import annotations

import difflib
import json
from typing import Any

from framework.config.source import KeyPath, dotted

Schema = dict[str, Any]

_TYPES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "object": "an object",
    "null": "null",
}
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


ELEMENT = "[]"
"""Stands for the index of any element of a list in the path of a known key."""


def known_keys(schema: Schema) -> dict[KeyPath, Schema]:
    """All keys of a config and of its sections, and the elements of its lists: path -> JSON schema.

    Args:
        schema: the JSON schema of the whole config, with `$defs`.
    """

    def walk(node: Schema, key_path: KeyPath) -> None:
        for option in node.get("anyOf", [node]):
            if "$ref" in option:
                option = schema["$defs"][option["$ref"].rpartition("/")[2]]
            inner = option.get("properties", {}) | ({ELEMENT: option["items"]} if "items" in option else {})
            for part, value in inner.items():
                found[*key_path, part] = value
                walk(value, (*key_path, part))

    found: dict[KeyPath, Schema] = {}
    walk(schema, ())
    return found


def known_path(key_path: KeyPath) -> KeyPath:
    """The path under which `known_keys` has a key: with `ELEMENT` for the indices of lists."""
    return tuple(ELEMENT if isinstance(part, int) else part for part in key_path)


def describe(schema: Schema) -> str:
    """What a key accepts, such as "a number above 0, or null"."""
    if "anyOf" in schema:
        return ", or ".join(describe(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        *most, last = (json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
        return f"{', '.join(most)} or {last}" if most else last
    if "$ref" in schema:
        return _TYPES["object"]
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {describe(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"a {'non-empty ' if schema.get('minItems') else ''}list, each item {describe(schema['items'])}"
    if "examples" in schema:
        return f"{_TYPES[schema['type']]} such as {json.dumps(schema['examples'][0])}"
    if schema["type"] == "string" and schema.get("minLength"):
        return "a non-empty string"
    if "minimum" in schema and schema["minimum"] == schema.get("maximum"):
        return str(schema["minimum"])
    bounds = " and ".join(f"{word} {schema[name]}" for name, word in _BOUNDS.items() if name in schema)
    return f"{_TYPES[schema['type']]} {bounds}".rstrip()


def unknown_key(key_path: KeyPath, known: dict[KeyPath, Schema]) -> str:
    """The message for a key that does not exist: with the key that was probably meant, else with all that exist there.

    A key of that name in another section is meant before one of similar name here.
    """
    *section, key = known_path(key_path)
    names = {path: str(path[-1]) for path in known if path[-1] != ELEMENT}
    siblings = [path for path in names if path[:-1] == tuple(section)]
    elsewhere = [path for path, name in names.items() if name == key]
    close_here = difflib.get_close_matches(str(key), [names[path] for path in siblings], n=1)
    close_anywhere = difflib.get_close_matches(str(key), dict.fromkeys(names.values()), n=1, cutoff=0.75)
    if elsewhere:
        meant = elsewhere
    elif close_here:
        meant = [(*section, close_here[0])]
    else:
        meant = [path for path, name in names.items() if name in close_anywhere]
    if meant:
        return f"unknown key, did you mean {' or '.join(_name(path) for path in meant)}?"
    place = f"{_name(tuple(section))} has" if section else "the sections are"
    return f"unknown key, {place} {', '.join(names[path] for path in siblings)}"


def _name(known: KeyPath) -> str:
    """A known key as messages name it: `data.train[].path`."""
    return dotted(known).replace(f".{ELEMENT}", ELEMENT)
