"""Every format, from every kind of file, to ids, labels and the selection of what is supervised; written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from framework.data import evaluation_batches, load_dataset
from framework.data.dialects import check_sharegpt, from_sharegpt
from framework.errors import UserError
from framework.selection import select, supervised_positions

A, B, C, D, S, R = 16, 17, 18, 19, 34, 33
BOS, END, USER, ASSISTANT, NEWLINE = 1, 2, 3, 4, 102
NONE = -100


def says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# A record, its ids, and its labels: the ids of what is learnt.
CASES = {
    "messages": (
        {"messages": [says("system", "s"), says("user", "a"), says("assistant", "b")]},
        [BOS, USER, S, END, USER, A, END, ASSISTANT, B, END],
        [NONE] * 8 + [B, END],
    ),
    "messages of which one is not learnt": (
        {
            "messages": [
                says("user", "a"),
                says("assistant", "b") | {"weight": 0},
                says("user", "c"),
                says("assistant", "d"),
            ]
        },
        [BOS, USER, A, END, ASSISTANT, B, END, USER, C, END, ASSISTANT, D, END],
        [NONE] * 11 + [D, END],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": who, "value": text} for who, text in (("system", "s"), ("human", "a"), ("gpt", "b"))
            ]
        },
        [BOS, USER, S, END, USER, A, END, ASSISTANT, B, END],
        [NONE] * 8 + [B, END],
    ),
    "sharegpt under other keys": (
        {"system": "s", "conversation": [says("user", "a"), says("assistant", "b"), says("user", "c")]},
        [BOS, USER, S, END, USER, A, END, ASSISTANT, B, END, USER, C, END],
        [NONE] * 8 + [B, END] + [NONE] * 3,
    ),
    "alpaca": (
        {"instruction": "a", "input": "b", "output": "c", "text": "whole"},
        [BOS, USER, A, NEWLINE, B, END, ASSISTANT, C, END],
        [NONE] * 7 + [C, END],
    ),
    "alpaca with history": (
        {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]},
        [BOS, USER, S, END, USER, A, END, ASSISTANT, B, END, USER, C, END, ASSISTANT, D, END],
        [NONE] * 8 + [B, END] + [NONE] * 4 + [D, END],
    ),
    "completion": ({"prompt": "ab", "completion": "c"}, [A, B, C, END], [NONE, NONE, C, END]),
    "completion of messages": (
        {
            "prompt": [says("user", "a"), says("assistant", "b"), says("user", "c")],
            "completion": [says("assistant", "d")],
        },
        [BOS, USER, A, END, ASSISTANT, B, END, USER, C, END, ASSISTANT, D, END],
        [NONE] * 11 + [D, END],
    ),
    "text": ({"text": "abc"}, [A, B, C], [NONE, B, C]),
}


def write(directory: Path, kind: str, *records: dict) -> Path:
    path = directory / f"data{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == ".json":
        path.write_text(json.dumps({"data": records}, indent=1))
    elif kind == ".parquet":
        datasets.Dataset.from_list(list(records)).to_parquet(path)
    else:
        datasets.Dataset.from_list(list(records)).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ""])
@pytest.mark.parametrize("case", CASES)
def test_ids_labels_and_selection(tmp_path: Path, tiny_tokenizer, kind: str, case: str) -> None:
    record, ids, labels = CASES[case]
    datasets.disable_progress_bars()
    path = write(tmp_path, kind, record)
    data = load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=16)
    assert data.report.formats == {str(path): case.split()[0]}
    (sample,) = data
    assert sample.input_ids.tolist() == ids
    assert sample.labels.tolist() == labels

    (batch,) = evaluation_batches(data, sequence_length=16, micro_batch_size=1, pad_token_id=END)
    supervised = supervised_positions(batch.inputs["labels"], causal=True)
    selection = select(
        strategy="supervised", ratio="labelled", supervised=supervised, documents=batch.documents, seed=0
    )
    # The position before each label: what is read there predicts it. Padding with the end of sequence hides none.
    expected = [position - 1 for position, label in enumerate(labels) if label != NONE]
    assert selection.positions[selection.valid].tolist() == expected
    assert batch.supervised_tokens == len(expected)


def test_calls_in_sharegpt_turns(tmp_path: Path, tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}<assistant>{% generation %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments.x }}{% endfor %}<end>"
        "{% endgeneration %}{% else %}<user>{{ m.role[0] }}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = (
        ("human", "a"),
        ("function_call", '{"name": "b", "arguments": {"x": "c"}}'),
        ("observation", "r"),
        ("gpt", "d"),
    )
    record = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "tools": json.dumps([{"name": "b", "description": "s"}]),
    }
    (sample,) = load_dataset(write(tmp_path, ".jsonl", record), tokenizer=tiny_tokenizer, sequence_length=16)
    # b <user> u a <assistant> b c <end> <user> t r <assistant> d <end>
    assert sample.input_ids.tolist() == [B, USER, 36, A, ASSISTANT, B, C, END, USER, 35, R, ASSISTANT, D, END]
    assert sample.labels.tolist() == [NONE] * 5 + [B, C, END] + [NONE] * 4 + [D, END]


def test_alpaca_without_a_chat_template_has_stanfords_prompt(tmp_path: Path, tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = None
    path = write(
        tmp_path,
        ".jsonl",
        {"instruction": "Do.", "input": None, "output": "b"},
        {"instruction": "Do.", "input": "It", "output": "b"},
    )
    data = load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=512)
    below = "Below is an instruction that describes a task"
    answer = "Write a response that appropriately completes the request.\n\n### Instruction:\nDo.\n\n### "
    assert [tiny_tokenizer.decode(sample.input_ids) for sample in data] == [
        f"{below}. {answer}Response:b<end>",
        f"{below}, paired with an input that provides further context. {answer}Input:\nIt\n\n### Response:b<end>",
    ]
    assert [sample.labels[sample.labels != NONE].tolist() for sample in data] == [[B, END]] * 2

    path = write(tmp_path, ".jsonl", {"instruction": "a", "output": "b", "history": [["c", "d"]]})
    with pytest.raises(
        UserError, match=r"data\.jsonl:1: `history` needs a chat template, which this tokenizer has not"
    ):
        load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=512)


def test_only_the_last_turn_is_learnt_if_asked(tmp_path: Path, tiny_tokenizer) -> None:
    chat = [says("user", "a"), says("assistant", "b"), says("user", "c"), says("assistant", "d")]
    path = write(
        tmp_path,
        ".jsonl",
        {"prompt": "a", "completion": "bc"},
        {"prompt": chat[:1], "completion": chat[1:]},
    )
    data = load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=16, train_on="last_assistant")
    assert [sample.labels[sample.labels != NONE].tolist() for sample in data] == [[B, C, END], [D, END]]
    data = load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=16)
    assert [sample.labels[sample.labels != NONE].tolist() for sample in data] == [[B, C, END], [B, END, D, END]]


def test_files_of_several_kinds_and_formats_keep_their_order(tmp_path: Path, tiny_tokenizer) -> None:
    paths = [
        write(tmp_path, ".parquet", CASES["text"][0]),
        write(tmp_path, ".json", CASES["completion"][0], CASES["completion"][0]),
        write(tmp_path, ".jsonl", CASES["alpaca"][0]),
    ]
    data = load_dataset(paths, tokenizer=tiny_tokenizer, sequence_length=16)
    assert [sample.input_ids.tolist() for sample in data] == [
        CASES[name][1] for name in ("text", "completion", "completion", "alpaca")
    ]


def test_a_broken_record_is_named_with_its_row(tmp_path: Path, tiny_tokenizer) -> None:
    paths = [
        write(tmp_path, ".parquet", {"text": "a"}, {"text": None}),
        write(tmp_path, ".json", {"text": "a"}, {"text": 1}),
        write(tmp_path, ".jsonl", {"text": "a"}, {"txt": "b"}),
    ]
    with pytest.raises(UserError) as error:
        load_dataset(paths, tokenizer=tiny_tokenizer, sequence_length=16)
    assert str(error.value).splitlines() == [
        "data.train: broken records",
        f"  {paths[0]}[1]: missing key `text` (found (none))",
        f"  {paths[1]}[1]: `text` must be a text, not a number",
        f"  {paths[2]}:2: missing key `text` (found `txt`)",
    ]


def test_sharegpt_turns_with_role_and_content_keep_what_else_a_message_says() -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}]
    messages = [
        says("user", "a"),
        says("assistant", "") | {"tool_calls": calls},
        says("tool", "b") | {"name": "f"},
        says("assistant", "c") | {"reasoning_content": "d", "train": True},
    ]
    record = {"conversations": messages}
    assert check_sharegpt(record) is None
    assert from_sharegpt(record)["messages"] == messages
    broken = {"conversations": [messages[0], messages[1] | {"tool_calls": [{}]}]}
    assert "conversations[1]: tool_calls: [0] must be an object" in check_sharegpt(broken)
