"""Conversations: what makes one valid, which of its messages are learnt, and the form that chat templates take."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from framework.data.readers import type_name

Content = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a message may have. What a chat template makes of them is the template's business."""

LEARNT_KEYS = ("train", "weight")
"""Keys of a message that say whether it is learnt; axolotl's and OpenAI's."""


@dataclass(frozen=True)
class Conversation:
    """A conversation as chat templates take it."""

    place: str
    """Where its record stands, as error messages name it."""
    messages: list[dict[str, Any]]
    """Each with `role` and `content`, a text, and perhaps `tool_calls` and further keys for the template."""
    learnt: list[bool]
    """For each message whether its tokens carry labels."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""
    variables: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""


def conversation(place: str, content: Content, *, train_on: str = "assistant") -> Conversation:
    """The conversation of a valid `messages` record.

    Args:
        place: Where the record stands.
        content: The record.
        train_on: `assistant`: all assistant messages are learnt but those that their own keys exempt;
            `last_assistant`: of these the last alone.
    """
    messages = content["messages"]
    learnt = [message["role"] == "assistant" and not _is_exempt(message) for message in messages]
    if train_on == "last_assistant":
        last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        learnt = [each and index == last for index, each in enumerate(learnt)]
    tools = parsed(content.get("tools"))
    return Conversation(
        place,
        [_as_templates_take_it(message) for message in messages],
        learnt,
        [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] if tools else None,
        content.get("chat_template_kwargs") or {},
    )


def check_messages(content: Content, key: str = "messages") -> str | None:
    """What is wrong with a `messages` record, or None; `key` is what a message calls the list."""
    if "messages" not in content:
        return f"missing key `{key}` (found {names(content)})"
    messages = content["messages"]
    if problem := check_list(messages, key):
        return problem
    for index, message in enumerate(messages):
        if problem := _check_message(message):
            return f"{key}[{index}]: {problem}"
    variables = content.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        return f"`chat_template_kwargs` must be an object, not {type_name(variables)}"
    return _check_tools(content)


def check_list(value: Any, key: str) -> str | None:
    """What is wrong with a value that must be a list with something in it, or None."""
    if not isinstance(value, list):
        return f"`{key}` must be a list, not {type_name(value)}"
    return None if value else f"`{key}` is empty"


def check_texts(content: Content, keys: tuple[str, ...]) -> str | None:
    """What is wrong with keys that must be there and hold texts, or None."""
    for key in keys:
        if key not in content:
            return f"missing key `{key}` (found {names(content)})"
        if not isinstance(content[key], str):
            return f"`{key}` must be a text, not {type_name(content[key])}"
    return None


def names(content: Content) -> str:
    """The keys of a record, for messages."""
    return ", ".join(f"`{key}`" for key in content) or "(none)"


def check_tool_calls(calls: Any) -> str | None:
    """What is wrong with the calls of tools in a message, or None."""
    if not isinstance(calls, list):
        return f"must be a list, not {type_name(calls)}"
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            return f"[{index}] must be an object with `name` and `arguments`, perhaps under `function`"
        arguments = parsed(function.get("arguments", {}))
        if not isinstance(arguments, dict):
            return f"[{index}]: `arguments` must be an object, or one as JSON text, not {type_name(arguments)}"
    return None


def parsed(value: Any) -> Any:
    """What a text holds as JSON, the text itself if it is none; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _check_message(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"must be an object with `role` and `content`, not {type_name(message)}"
    if problem := check_texts(message, ("role",)):
        return problem
    role, calls = message["role"], message.get("tool_calls")
    if role not in ROLES:
        return f"unknown role {role!r}; known: {', '.join(ROLES)}"
    if calls and role != "assistant":
        return f"only the assistant calls tools, not the {role}"
    if calls and (problem := check_tool_calls(calls)):
        return f"tool_calls: {problem}"
    if not (calls and message.get("content") is None):
        if isinstance(message.get("content"), list):
            problem = _check_text_parts(message["content"])
        else:
            problem = check_texts(message, ("content",))
        if problem:
            return problem
    return _check_learnt(message)


def _check_text_parts(parts: list[Any]) -> str | None:
    for index, part in enumerate(parts):
        if not (isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text"):
            return f"content[{index}]: only texts are trained on, {{'type': 'text', 'text': …}}; no images or sound"
    return None


def _check_learnt(message: Content) -> str | None:
    train, weight = (message.get(key) for key in LEARNT_KEYS)
    if train is not None and not isinstance(train, bool):
        return f"`train` must be true or false, not {type_name(train)}"
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        return f"`weight` must be 0 or 1, not {json.dumps(weight)}: all labels count the same in the loss"
    if train is not None and weight is not None and train != bool(weight):
        return f"`train` {json.dumps(train)} contradicts `weight` {weight}"
    if (train or weight) and message["role"] != "assistant":
        return f"only what the assistant says is learnt, but this message of the {message['role']} asks to be"
    return None


def _check_tools(content: Content) -> str | None:
    tools = parsed(content.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list):
        return f"`tools` must be a list, or one as JSON text, not {type_name(tools)}"
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            return f"tools[{index}] must describe a function, with its `name`"
    return None


def _is_exempt(message: Content) -> bool:
    return message.get("train") is False or message.get("weight") == 0


def _as_templates_take_it(message: Content) -> dict[str, Any]:
    """A message without what is for us, nulls (templates print them as `None`) and the many forms of tool calls.

    Most templates print arguments as JSON, which a text that is JSON already would become a second time.
    """
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    taken = {key: value for key, value in message.items() if value is not None and key not in LEARNT_KEYS}
    taken["content"] = content or ""
    if calls := taken.pop("tool_calls", None):
        taken["tool_calls"] = [_call(call) for call in calls]
    return taken


def _call(call: Content) -> dict[str, Any]:
    function = call.get("function", call)
    function = {"name": function["name"], "arguments": parsed(function.get("arguments", {}))}
    return ({key: value for key, value in call.items() if key == "id"}) | {"type": "function", "function": function}
