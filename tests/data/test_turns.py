"""Assistant turns in the renderings of chat templates that have the structure of published ones."""

from __future__ import annotations

import pytest
from rendered_turns import CHATML, TEMPLATES, TWO_TURNS, WITH_SYSTEM, marked, record, refusal, with_special_tokens
from transformers import PreTrainedTokenizerFast

from framework.data.labels import label_records


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_special_tokens(tiny_tokenizer)


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        (
            "llama 3",
            WITH_SYSTEM,
            "<bos><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦b c<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nd<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦e<|eot_id|>⟧",
        ),
        (
            "qwen 2.5",
            TWO_TURNS,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b c<|im_end|>⟧\n"
            "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n⟦\ne<|im_end|>⟧\n",
        ),
        (
            "mistral 1",
            WITH_SYSTEM,
            "<bos> [INST] s\n\na [/INST]⟦ b c<end>⟧ [INST] d [/INST]⟦ \ne<end>⟧",
        ),
        ("mistral 3", TWO_TURNS, "<bos>[INST] a[/INST]⟦ b c<end>⟧[INST] d[/INST]⟦ \ne<end>⟧"),
        (
            "gemma",
            TWO_TURNS,
            "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n⟦b c<end_of_turn>⟧\n"
            "<start_of_turn>user\nd<end_of_turn>\n<start_of_turn>model\n⟦e<end_of_turn>⟧\n",
        ),
        (
            "phi 3",
            WITH_SYSTEM,
            "<|system|>\ns<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n⟦b c<|end|>⟧\n"
            "<|user|>\nd<|end|>\n<|assistant|>\n⟦\ne<|end|>\n<end>⟧",
        ),
        # Only the last answer has a `<think>` block; earlier ones are learnt as they stand.
        (
            "qwen 3",
            WITH_SYSTEM,
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b c<|im_end|>⟧\n"
            "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\ne<|im_end|>⟧\n",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value in TEMPLATES else "",
)
def test_turns_of_published_structures(tokenizer, name: str, messages: list, expected: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    each = record(messages)
    assert marked(tokenizer, each) == expected
    assert expected.replace("⟦", "").replace("⟧", "") == tokenizer.apply_chat_template(
        each.content["messages"], tokenize=False
    )
    others, _, last = expected.rpartition("⟦")
    assert marked(tokenizer, each, "last_assistant") == others.replace("⟦", "").replace("⟧", "") + "⟦" + last


def test_ids_are_those_of_the_template(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["gemma"]
    ((ids, supervised),) = label_records("messages", [record(TWO_TURNS[:2])], tokenizer)
    # <bos> <start_of_turn> u s e r \n a <end_of_turn> \n <start_of_turn> m o d e l \n b _ c <end_of_turn> \n
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<start_of_turn>", "<end_of_turn>"))
    assert ids.tolist() == [
        *(1, start, 36, 34, 20, 33, 102, 16, end, 102),
        *(start, 28, 30, 19, 20, 27, 102, 17, 100, 18, end, 102),
    ]
    assert supervised.nonzero()[0].tolist() == [17, 18, 19, 20]


@pytest.mark.parametrize("name", ["mistral 3", "gemma"])
def test_a_system_message_that_a_template_cannot_take_is_refused(tokenizer, name: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    for train_on in ("assistant", "last_assistant"):
        message = refusal(tokenizer, record(WITH_SYSTEM), train_on)
        if name == "gemma":
            assert message == "the chat template cannot render these messages: System role not supported"
        else:
            assert message.startswith("the chat template is not prefix-preserving: it renders messages 0 to ")


@pytest.mark.parametrize("markers", [False, True])
def test_messages_that_are_not_to_be_learnt(tokenizer, markers: bool) -> None:
    if not markers:
        tokenizer.chat_template = TEMPLATES["phi 3"]
    first, second = ("b c<end>", "e<end>") if markers else ("b c<|end|>", "e<|end|>\n<end>")

    def learnt(messages: list, train_on: str = "assistant") -> list[str]:
        return [part.split("⟧")[0] for part in marked(tokenizer, record(messages), train_on).split("⟦")[1:]]

    def turns(**keys) -> list:
        return [*TWO_TURNS[:1], {"role": "assistant", "content": "b c", **keys}, *TWO_TURNS[2:3], ("assistant", "e")]

    assert learnt(turns()) == learnt(turns(train=True)) == learnt(turns(weight=1)) == [first, second]
    assert learnt(turns(train=None, weight=None)) == [first, second]
    for exempt in ({"train": False}, {"weight": 0}, {"weight": 0.0, "train": False}):
        assert learnt(turns(**exempt)) == [second]
        assert learnt(turns(**exempt)[:2]) == []
    assert learnt(turns(), "last_assistant") == [second]
    last_exempt = [*TWO_TURNS[:3], {"role": "assistant", "content": "e", "train": False}]
    assert learnt(last_exempt) == [first]
    assert learnt(last_exempt, "last_assistant") == []
    assert learnt([*turns(), ("user", "f")], "last_assistant") == [second.removesuffix("\n<end>")]


def test_markers_that_cannot_be_told_apart_are_refused(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}<end>{% endgeneration %}{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    )
    assert marked(tokenizer, record(TWO_TURNS)) == "<user>a⟦b c<end>⟧<user>d⟦\ne<end>⟧"
    message = refusal(tokenizer, record(TWO_TURNS), "last_assistant")
    assert "some assistant messages are not to be learnt" in message
    assert "markers mark 4 parts for 2 assistant messages" in message


def test_texts_in_parts_are_one_text(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["phi 3"]
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": " c"}]
    in_parts = record([TWO_TURNS[0], {"role": "assistant", "content": parts}, *TWO_TURNS[2:]])
    assert marked(tokenizer, in_parts) == marked(tokenizer, record(TWO_TURNS))


def test_a_template_that_is_not_prefix_preserving_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATES["phi 3"]
    assert refusal(tokenizer, record(TWO_TURNS)).startswith(
        "the chat template is not prefix-preserving: it renders messages 0 to 1 differently when more follow"
    )
    # An answer that ends otherwise when it is not the last: where it ends cannot be told.
    tokenizer.chat_template = TEMPLATES["phi 3"].replace("'<|end|>\n'", "('<|end|>' if loop.last else '\n')")
    assert "not prefix-preserving" in refusal(tokenizer, record(TWO_TURNS))


def test_answers_without_an_end_are_warned_of(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    with pytest.warns(UserWarning, match=r"data\.jsonl:7: the chat template ends an answer without a special token"):
        assert marked(tokenizer, record(TWO_TURNS[:2])) == "<|user|>\na<|assistant|>\n⟦b c⟧"


def test_generation_markers_say_what_is_learnt(tokenizer) -> None:
    messages = [("system", "s"), ("user", "a\n"), ("assistant", "b c"), ("user", "d"), ("assistant", "")]
    by_markers = marked(tokenizer, record(messages))
    assert by_markers == "<bos><user>s<end><user>a\n<end><assistant>⟦b c<end>⟧<user>d<end><assistant>⟦<end>⟧"
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert marked(tokenizer, record(messages)) == by_markers


def test_markers_that_mark_nothing_are_refused(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'bot' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert "marks nothing" in refusal(tokenizer, record(TWO_TURNS))
    assert marked(tokenizer, record(TWO_TURNS[:1])) == "a"


def test_an_assistant_that_begins_needs_markers(tokenizer) -> None:
    begins = record([("assistant", "a"), ("user", "b"), ("assistant", "c")])
    assert marked(tokenizer, begins) == "<bos><assistant>⟦a<end>⟧<user>b<end><assistant>⟦c<end>⟧"
    tokenizer.chat_template = CHATML
    assert refusal(tokenizer, begins).startswith("the conversation begins with the assistant")
    assert marked(tokenizer, begins, "last_assistant").endswith("<|im_start|>assistant\n⟦c<|im_end|>⟧\n")
