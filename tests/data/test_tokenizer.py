from __future__ import annotations

from pathlib import Path

import pytest

from framework.data import load_tokenizer
from framework.errors import UserError


def test_a_tokenizer_comes_with_its_chat_template(tiny_tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_path))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert text == "<bos><user>a<end><assistant>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_without_a_padding_token_the_end_of_sequence_pads(tmp_path: Path, tiny_tokenizer) -> None:
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_without_either_it_is_refused(tmp_path: Path, tiny_tokenizer) -> None:
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token = None
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a padding nor an end-of-sequence token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere/at-all", "{tmp_path}"])
def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = name.format(tmp_path=tmp_path)
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert f"model.tokenizer: cannot load a tokenizer from '{path}'" in str(error.value)
    assert "Give a directory with tokenizer.json" in str(error.value)


def test_a_broken_tokenizer_file_is_refused(tmp_path: Path, tiny_tokenizer) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))
