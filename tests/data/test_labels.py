from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from framework.data.formats import Record
from framework.data.labels import label_completion, label_messages, label_text
from framework.errors import UserError


def record(**content) -> Record:
    return Record("data.jsonl:7", content)


def chat(*turns: tuple[str, str]) -> Record:
    return record(messages=[{"role": role, "content": content} for role, content in turns])


def shown(tokenizer: PreTrainedTokenizerFast, labelled: tuple) -> str:
    """The tokens, those with a label in brackets."""
    ids, supervised = labelled
    pieces = []
    for token, learnt in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), supervised.tolist(), strict=True):
        pieces.append(f"[{token}]" if learnt else token)
    return "".join(pieces)


def only(labelled: list) -> tuple:
    assert len(labelled) == 1
    return labelled[0]


CONVERSATION = chat(("system", "s"), ("user", "a\n"), ("assistant", "b c"), ("user", "d"), ("assistant", ""))


def test_text_has_a_label_on_every_token(tiny_tokenizer) -> None:
    ids, supervised = only(label_text([record(text="ab a")], tiny_tokenizer))
    assert ids.tolist() == [16, 17, 100, 16]
    assert ids.dtype == "int32"
    assert supervised.tolist() == [True] * 4


def test_completion_has_labels_on_completion_and_end(tiny_tokenizer) -> None:
    labelled = label_completion(
        [
            record(prompt="ab", completion=" c"),
            record(prompt="", completion="d"),
            record(prompt="a", completion="b<end>"),
        ],
        tiny_tokenizer,
    )
    assert [ids.tolist() for ids, _ in labelled] == [[16, 17, 100, 18, 2], [19, 2], [16, 17, 2]]
    assert [supervised.tolist() for _, supervised in labelled] == [
        [False, False, True, True, True],
        [True, True],
        [False, True, True],
    ]


def test_completion_keeps_the_prompts_own_tokens_and_adds_nothing_behind_it() -> None:
    """`ab` would be one token, and the tokenizer closes every text with a separator."""
    model = models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}, [("a", "b")])
    backend = Tokenizer(model)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer("ab")["input_ids"] == [3, 2, 4]
    ids, supervised = only(label_completion([record(prompt="a", completion="b")], tokenizer))
    assert ids.tolist() == [3, 0, 1, 4]
    assert supervised.tolist() == [False, False, True, True]


def test_completion_without_an_end_token_is_refused(tiny_tokenizer) -> None:
    tiny_tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        label_completion([record(prompt="a", completion="b")], tiny_tokenizer)


def test_no_chat_template_is_refused(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"data\.jsonl:7: .*needs a chat template"):
        label_messages([CONVERSATION], tiny_tokenizer)


def test_null_keys_of_a_message_are_as_good_as_absent(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if m.name is defined %}{{ m.name }}{% endif %}{% endfor %}"
    )
    named = record(messages=[{"role": "assistant", "content": "a", "name": None}])
    assert shown(tiny_tokenizer, only(label_messages([named], tiny_tokenizer))) == "[a]"


def test_tokens_over_a_boundary_and_characters_of_several_tokens_belong_to_the_answer() -> None:
    """`:a` is one token that begins before the answer; `é` ends the answer and is two byte tokens."""
    letters = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, ":": 256, "a": 257, "b": 258, ":a": 259}
    backend = Tokenizer(models.BPE(letters, [(":", "a")], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}:{% generation %}{{ m.content }}{% endgeneration %}b"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    ids, supervised = only(label_messages([chat(("user", "b"), ("assistant", "aé"))], tokenizer))
    assert ids.tolist() == [258, 259, 0xC3, 0xA9, 258]
    assert supervised.tolist() == [False, True, True, True, False]


def test_characters_without_a_token_do_not_shift_labels() -> None:
    backend = Tokenizer(models.WordLevel({"q": 0, "x": 1, "y": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %} q"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    ids, supervised = only(label_messages([chat(("user", "q"), ("assistant", "  x y  "))], tokenizer))
    assert ids.tolist() == [0, 1, 2, 0]
    assert supervised.tolist() == [False, True, True, False]
