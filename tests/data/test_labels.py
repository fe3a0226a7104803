from __future__ import annotations

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
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

# Minimal templates with the structure of published ones.
CHATML = (
    "{% for m in messages %}{{ '<user>' + m.role[0] + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user>a\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set text = '<user>' + m.role[0] + '<assistant>\n\n' + m.content | trim + '<end>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user>a<assistant>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<user>' + m.content + '<assistant>' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '|' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<user>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<user>model\n' }}{% endif %}"
)
# Reasoning of earlier turns disappears when a further question follows.
QWEN_3 = (
    "{% for m in messages %}{{ '<user>' + m.role[0] + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '(think)' }}{% endif %}{{ m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user>a\n' }}{% endif %}"
)


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


def test_generation_markers_say_what_is_learnt(tiny_tokenizer) -> None:
    ids, supervised = only(label_messages([CONVERSATION], tiny_tokenizer))
    # <bos> <user> s <end> <user> a \n <end> <assistant> b _ c <end> <user> d <end> <assistant> <end>
    assert ids.tolist() == [1, 3, 34, 2, 3, 16, 102, 2, 4, 17, 100, 18, 2, 3, 19, 2, 4, 2]
    assert supervised.nonzero()[0].tolist() == [9, 10, 11, 12, 17]


def test_markers_and_growing_prefixes_agree(tiny_tokenizer) -> None:
    marked = only(label_messages([CONVERSATION], tiny_tokenizer))
    template = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    grown = only(label_messages([CONVERSATION], tiny_tokenizer))
    assert grown[0].tolist() == marked[0].tolist()
    assert grown[1].tolist() == marked[1].tolist()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<user>u\na<end>\n<user>a\n[b][ ][c][<end>]\n<user>u\nd<end>\n<user>a\n[\n][e][<end>]\n"),
        (
            LLAMA_3,
            "<bos><user>u<assistant>\n\na<end><user>a<assistant>\n\n[b][ ][c][<end>]"
            "<user>u<assistant>\n\nd<end><user>a<assistant>\n\n[e][<end>]",
        ),
        (MISTRAL, "<bos><user>a<assistant>[ ][b][ ][c][<end>]<user>d<assistant>[ ][\n][e][<end>]"),
        (PHI_3, "<user>\na|\n<assistant>\n[b][ ][c][|]\n<user>\nd|\n<assistant>\n[\n][e][|][\n][<end>]"),
        (
            GEMMA,
            "<bos><user>user\na<end>\n<user>model\n[b][ ][c][<end>]\n<user>user\nd<end>\n<user>model\n[e][<end>]\n",
        ),
    ],
    ids=["chatml", "llama 3", "mistral", "phi 3", "gemma"],
)
def test_templates_without_markers(tiny_tokenizer, template: str, expected: str) -> None:
    tiny_tokenizer.add_tokens([AddedToken("|", special=True)])  # Phi 3's end of turn is not its end of sequence
    tiny_tokenizer.chat_template = template
    conversation = chat(("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "\ne"))
    labelled = only(label_messages([conversation], tiny_tokenizer))
    assert shown(tiny_tokenizer, labelled) == expected
    rendered = tiny_tokenizer.apply_chat_template(conversation.content["messages"], return_dict=True)["input_ids"]
    assert labelled[0].tolist() == rendered


def test_a_template_that_is_not_prefix_preserving_is_refused(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = QWEN_3
    two_turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(UserError, match=r"data\.jsonl:7: the chat template is not prefix-preserving"):
        label_messages([two_turns], tiny_tokenizer)
    one_turn = only(label_messages([chat(("user", "a"), ("assistant", "b"))], tiny_tokenizer))
    assert shown(tiny_tokenizer, one_turn) == "<user>u\na<end>\n<user>a\n[(][t][h][i][n][k][)][b][<end>]\n"


def test_markers_that_mark_nothing_are_refused(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'bot' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"data\.jsonl:7: .*marks nothing"):
        label_messages([chat(("user", "a"), ("assistant", "b"))], tiny_tokenizer)
    unanswered = only(label_messages([chat(("user", "a"))], tiny_tokenizer))
    assert not unanswered[1].any()


def test_a_message_that_the_template_refuses_is_named(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = GEMMA
    with pytest.raises(UserError, match=r"data\.jsonl:7: .*System role not supported"):
        label_messages([CONVERSATION], tiny_tokenizer)


def test_an_assistant_that_begins_needs_markers(tiny_tokenizer) -> None:
    begins = chat(("assistant", "a"), ("user", "b"))
    assert (
        shown(tiny_tokenizer, only(label_messages([begins], tiny_tokenizer)))
        == "<bos><assistant>[a][<end>]<user>b<end>"
    )
    tiny_tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match="begins with the assistant"):
        label_messages([begins], tiny_tokenizer)


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
