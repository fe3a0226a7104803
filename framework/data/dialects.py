"""Other forms of conversations (ShareGPT, Alpaca, prompts and completions), checked and brought to `messages`."""

from __future__ import annotations

from typing import Any

from framework.data.conversations import (
    LEARNT_KEYS,
    Content,
    check_list,
    check_messages,
    check_texts,
    check_tool_calls,
    names,
    parsed,
)
from framework.data.readers import type_name

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
        if role == CALLER and (problem := check_tool_calls(_calls_of(text))):
            return f"{where}`{speaker}` must hold a call as JSON, an object with `name` and `arguments`: {problem}"
        role = "assistant" if role == CALLER else role
        if role == "system" and index:
            return f"{where}a system turn stands at the beginning only"
        if role == before and role != "tool":
            return f"{where}two turns of the {role} in a row, of which one is missing or wrong"
        before = role
    if problem := check_texts(_with_defaults(content, "system"), ("system",)):
        return problem
    if content.get("system") and SPEAKERS[_speaker_and_text(content[key][0])[0]] == "system":
        return f"the system's text stands twice, under `system` and in {key}[0]"
    return check_messages(from_sharegpt({**content, "system": None}), key)


def from_sharegpt(content: Content) -> Content:
    """A ShareGPT record whose turns have known speakers as a `messages` record."""
    messages = []
    for turn in content[sharegpt_list(content)]:
        speaker, text = _speaker_and_text(turn)
        role = SPEAKERS[speaker]
        kept = LEARNT_KEYS if "from" in turn else turn.keys() - {"role", "content", "value"}
        message = {"role": role, "content": text}
        if role == CALLER:
            message = {"role": "assistant", "content": None, "tool_calls": _calls_of(text)}
        messages.append(message | {key: turn[key] for key in kept if key in turn})
    if content.get("system"):
        messages.insert(0, {"role": "system", "content": content["system"]})
    return {**content, "messages": messages}


def check_alpaca(content: Content) -> str | None:
    """What is wrong with an Alpaca record, or None."""
    texts = _with_defaults(content, "input", "system")
    if problem := check_texts(texts, ("instruction", "input", "output", "system")):
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


def _with_defaults(content: Content, *keys: str) -> Content:
    """A record with an empty text where one of the keys is missing or null."""
    return content | {key: "" for key in keys if content.get(key) is None}


def _speaker_and_text(turn: Content) -> tuple[Any, Any]:
    speaker = turn.get("from", turn.get("role"))
    return speaker, turn.get("value", turn.get("content"))


def _calls_of(text: Any) -> Any:
    """The calls in the text of a ShareGPT turn that is nothing else."""
    calls = parsed(text)
    return calls if isinstance(calls, list) else [calls]
