"""Conversations: what makes one valid, and the forms it comes in brought to the one that chat templates take."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from framework.data.readers import type_name

Content = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a message may have. What a chat template makes of them is the template's business."""

CALLER = "tool_calls"
"""Stands for the role of a ShareGPT turn that is nothing but calls of tools: the assistant's."""

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALLER),
}
"""What the speakers of published ShareGPT data are in a chat template."""

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
    tools = _parsed(content.get("tools"))
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


def sharegpt_list(content: Content) -> str | None:
    """The key of a ShareGPT record that holds the turns, or None."""
    return next((key for key in ("conversations", "conversation", "messages") if key in content), None)


def check_sharegpt(content: Content) -> str | None:
    """What is wrong with a ShareGPT record, or None."""
    key = sharegpt_list(content)
    if key is None:
        return f"missing key `conversations` (found {names(content)})"
    if problem := check_list(content[key], key):
        return problem
    before = None
    for index, turn in enumerate(content[key]):
        where = f"{key}[{index}]: "
        if not isinstance(turn, dict):
            return f"{where}must be an object with `from` and `value`, not {type_name(turn)}"
        speaker, text = _speaker_and_text(turn)
        if speaker is None or text is None:
            return f"{where}needs `from` and `value`, or `role` and `content` (found {names(turn)})"
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            return f"{where}unknown speaker {speaker!r}; known: {', '.join(SPEAKERS)}"
        if role == CALLER and (problem := _check_tool_calls(_calls_of(text))):
            return f"{where}`{speaker}` must hold a call as JSON, an object with `name` and `arguments`: {problem}"
        role = "assistant" if role == CALLER else role
        if role == "system" and index:
            return f"{where}a system turn stands at the beginning only"
        if role == before and role != "tool":
            return f"{where}two turns of the {role} in a row, of which one is missing or wrong"
        before = role
    if problem := check_texts({"system": "", **content}, ("system",)):
        return problem
    return check_messages(from_sharegpt(content), key)


def from_sharegpt(content: Content) -> Content:
    """A ShareGPT record whose turns have known speakers as a `messages` record."""
    messages = []
    for turn in content[sharegpt_list(content)]:
        speaker, text = _speaker_and_text(turn)
        role = SPEAKERS[speaker]
        message = {"role": role, "content": text}
        if role == CALLER:
            message = {"role": "assistant", "content": None, "tool_calls": _calls_of(text)}
        messages.append(message | {key: turn[key] for key in LEARNT_KEYS if key in turn})
    if content.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": content["system"]})
    return {**content, "messages": messages}


def check_alpaca(content: Content) -> str | None:
    """What is wrong with an Alpaca record, or None."""
    if problem := check_texts({"input": "", "system": "", **content}, ("instruction", "input", "output", "system")):
        return problem
    history = content.get("history") or []
    is_pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    return None if is_pairs else "`history` must be a list of pairs of texts, an instruction and the answer to it"


def from_alpaca(content: Content) -> Content:
    """An Alpaca record as a `messages` record: instruction and input, a line each, are what the user says."""
    messages = [{"role": "system", "content": content["system"]}] if content.get("system") else []
    asked = "\n".join(text for text in (content["instruction"], content.get("input")) if text)
    for question, answer in [*(content.get("history") or []), (asked, content["output"])]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def alpaca_prompt(content: Content) -> str:
    """The prompt of an Alpaca record for a model without a chat template.

    The texts are those of https://github.com/tatsu-lab/stanford_alpaca (`PROMPT_DICT` in train.py).
    """
    if content.get("input"):
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{content['instruction']}\n\n### Input:\n{content['input']}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{content['instruction']}\n\n### Response:"
    )


def check_completion(content: Content) -> str | None:
    """What is wrong with a `completion` record of texts or of messages, or None."""
    if isinstance(content.get("label"), bool):
        return (
            "`label` says whether the completion is wanted: this is unpaired preference data (KTO), and training on "
            "preferences is not done here; keep the wanted completions, without the key"
        )
    prompt, completion = (content.get(key) for key in ("prompt", "completion"))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        if isinstance(prompt, list) != isinstance(completion, list) and {"prompt", "completion"} <= content.keys():
            return "`prompt` and `completion` must both be texts, or both lists of messages"
        return check_texts(content, ("prompt", "completion"))
    for key in ("prompt", "completion"):
        if problem := check_messages({**content, "messages": content[key]}, key):
            return problem
    return None


def is_chat(content: Content) -> bool:
    """Whether a valid `completion` record is one of messages."""
    return isinstance(content["prompt"], list)


def from_chat_completion(content: Content) -> Content:
    """A `completion` record of messages as a `messages` record in which the prompt is not learnt."""
    given = [
        {key: value for key, value in message.items() if key not in LEARNT_KEYS} | {"train": False}
        for message in content["prompt"]
    ]
    return {**content, "messages": [*given, *content["completion"]]}


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
    if calls and (problem := _check_tool_calls(calls)):
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


def _check_tool_calls(calls: Any) -> str | None:
    if not isinstance(calls, list):
        return f"must be a list, not {type_name(calls)}"
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            return f"[{index}] must be an object with `name` and `arguments`, perhaps under `function`"
        arguments = _parsed(function.get("arguments", {}))
        if not isinstance(arguments, dict):
            return f"[{index}]: `arguments` must be an object, or one as JSON text, not {type_name(arguments)}"
    return None


def _check_tools(content: Content) -> str | None:
    tools = _parsed(content.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list):
        return f"`tools` must be a list, or one as JSON text, not {type_name(tools)}"
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            return f"tools[{index}] must describe a function, with its `name`"
    return None


def _speaker_and_text(turn: Content) -> tuple[Any, Any]:
    speaker = turn.get("from", turn.get("role"))
    return speaker, turn.get("value", turn.get("content"))


def _calls_of(text: Any) -> Any:
    """The calls in the text of a ShareGPT turn that is nothing else."""
    calls = _parsed(text)
    return calls if isinstance(calls, list) else [calls]


def _parsed(value: Any) -> Any:
    """What a text holds as JSON, the text itself if it is none; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


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
    function = {"name": function["name"], "arguments": _parsed(function.get("arguments", {}))}
    return ({key: value for key, value in call.items() if key == "id"}) | {"type": "function", "function": function}
