from __future__ import annotations

import json
import textwrap
from pathlib import Path

import docstrings
import make_default_data
import pytest
import sentencepiece
from chat_tokenizer import save_tokenizer, train_sentencepiece
from docstrings import Definition, find_definitions, stable_hash
from make_default_data import DESCRIBE, SIGNATURE, as_messages, assign_tasks, check_round_trip, main

from framework.data import load_dataset, load_tokenizer

MODULE = '''
    """Of the module: not a definition."""

    class Rectangle(Shape, frozen=True):
        """A shape with four corners.

        Attributes:
            width: In metres.
        """

        def __init__(self, width: float, height: float = 1.0) -> None:
            """Private, like everything with an underscore."""

        @property
        def area(self) -> float:
            """Area in
            square metres."""
            return self.width * self.height

    async def fetch(url, *, retries=3, **options) -> bytes:
        """Get what is behind an address.

        Parameters
        ----------
        url : str
        """
        def inner():
            """Nobody calls what is inside."""

    def undocumented(): ...

    def copied(url):
        """Get what is   behind `COPIED` an address.

        Parameters
        ----------
        url : str
        """
'''


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Definition]:
    package = tmp_path / "package" / "shapes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(MODULE))
    (package / "broken.py").write_text('def f(:\n    """Not a definition of anything."""')
    (package / "tests").mkdir()
    (package / "tests" / "shapes.py").write_text('def helper():\n    """Tests are left out of the data."""')
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path / "package"))
    return find_definitions(1000, workers=1)


def test_definitions_are_read_from_source_files(definitions: list[Definition]) -> None:
    assert [(each.place, each.signature) for each in definitions] == [
        ("shapes", "async def fetch(url, *, retries=3, **options) -> bytes:"),
        (
            "shapes",
            "class Rectangle(Shape, frozen=True):\n    def __init__(self, width: float, height: float=1.0) -> None:",
        ),
        ("shapes.Rectangle", "def area(self) -> float:"),
    ]
    assert definitions[0].documentation == "Get what is behind an address.\n\nParameters\n----------\nurl : str"
    assert [each.description for each in definitions] == [
        "Get what is behind an address.",
        "A shape with four corners.",
        "Area in\nsquare metres.",
    ]


def test_the_two_tasks(definitions: list[Definition]) -> None:
    fetch = definitions[0]
    assert as_messages(fetch, DESCRIBE) == [
        {"role": "user", "content": f"Describe this function of shapes.\n\n{fetch.signature}"},
        {"role": "assistant", "content": "Get what is behind an address."},
    ]
    assert as_messages(fetch, SIGNATURE) == [
        {
            "role": "user",
            "content": "Give the signature of the function of shapes with this documentation.\n\n"
            + fetch.documentation,
        },
        {"role": "assistant", "content": fetch.signature},
    ]


@pytest.mark.parametrize(
    ("documentation", "description"),
    [
        ("Sum up.\n\nArgs:\n    x: one", "Sum up."),
        ("Sum up.\n\n:param x: one", "Sum up."),
        ("Sum up.\n>>> f(1)\n2", "Sum up."),
        ("Sum up.\n\nIn two parts: one.\n\nReturns: all", "Sum up.\n\nIn two parts: one."),
        ("Parameters\n----------\nx : int", ""),
        ("x (`int`):\n    One.", ""),
    ],
)
def test_a_description_ends_where_sections_begin(documentation: str, description: str) -> None:
    assert Definition("m", "def f():", documentation, "").description == description


def test_hashes_are_the_same_everywhere() -> None:
    assert stable_hash("a", 0) == 9398663524571839764
    assert stable_hash("a", 1) != stable_hash("a", 0)


TEXTS = [
    "def f(x):\n    return [x,  1]\n\n\n        # naïve — 漢字 🎉\r\n",
    "  A text that begins and ends with blanks  ",
    "\n\n>>> tensor([[0.1, 0.2]])\n",
    "\u00a0not \u2028 usual\x0c",
    "",
]


@pytest.fixture(scope="module")
def model() -> bytes:
    source = Path(make_default_data.__file__).read_text()
    return train_sentencepiece([source[i : i + 400] for i in range(0, len(source), 400)], vocabulary=600, threads=1)


def test_the_tokenizer_is_the_sentencepiece_model(model: bytes, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(model, tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.model"))
    loaded = load_tokenizer(str(tmp_path))
    source = Path(make_default_data.__file__).read_text()
    assert len(loaded) == 600
    for text in [*TEXTS, source]:
        ids = processor.encode(text)
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer(text)["input_ids"] == [1, *ids]
    check_round_trip([*TEXTS, source], loaded)


def test_the_chat_template_marks_answers(model: bytes, tmp_path: Path) -> None:
    save_tokenizer(model, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    messages = [
        {"role": "system", "content": " s\n"},
        {"role": "user", "content": "a\n  b"},
        {"role": "assistant", "content": "\n  c "},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|begin|><|system|> s\n<|end|><|user|>a\n  b<|end|><|assistant|>\n  c <|end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text == prompt + "\n  c <|end|>"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(learnt) == "\n  c <|end|>"
    assert tokenizer.eos_token == "<|end|>"  # generation stops after an answer


def test_tasks_are_balanced_to_a_quarter_of_labels(model: bytes, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(model, tmp_path)
    definitions = [
        Definition(
            f"m{n}", f"def f{n}(a, b):", f"Adds {n} to everything it is given.\n\nArgs:\n" + "    a: b\n" * (n % 9), ""
        )
        for n in range(400)
    ]
    tasks = assign_tasks(definitions, tokenizer, seed=0)
    pairs = [as_messages(each, task) for each, task in zip(definitions, tasks, strict=True)]
    masks = tokenizer.apply_chat_template(pairs, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert set(tasks) == {DESCRIBE, SIGNATURE}
    assert sum(map(sum, masks)) / sum(map(len, masks)) == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_the_whole_tool_on_a_thousand_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for output in (first, second):
        assert main(["--output", str(output), "--pairs", "1000", "--seed", "3"]) == 0
    assert sorted(path.name for path in first.iterdir()) == ["about.json", "eval.jsonl", "tokenizer", "train.jsonl"]
    for name in ("train.jsonl", "eval.jsonl", "tokenizer/tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    questions = {
        name: {json.loads(line)["messages"][0]["content"] for line in (first / f"{name}.jsonl").open()}
        for name in ("train", "eval")
    }
    assert len(questions["train"]) + len(questions["eval"]) == 1000
    assert questions["train"].isdisjoint(questions["eval"])
    tokenizer = load_tokenizer(str(first / "tokenizer"))
    assert len(tokenizer) == make_default_data.VOCABULARY
    dataset = load_dataset(
        first / "train.jsonl", tokenizer=tokenizer, sequence_length=make_default_data.BALANCED_LENGTH
    )
    assert dataset.report.labelled_share == pytest.approx(0.25, abs=0.03)

    modified = (first / "train.jsonl").stat().st_mtime_ns
    assert main(["--output", str(first), "--pairs", "1000", "--seed", "3"]) == 0
    assert "is there already, made with the same arguments" in capsys.readouterr().out
    assert (first / "train.jsonl").stat().st_mtime_ns == modified


def test_what_others_put_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert (tmp_path / "mine.txt").read_text() == "mine"
