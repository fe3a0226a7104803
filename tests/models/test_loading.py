"""Loading and random initialisation: values, random state, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from framework.errors import UserError
from framework.models import load_model


def load(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "path": None,
        "from_config": None,
        "task": "causal_lm",
        "dtype": torch.float32,
        "attention": "sdpa",
        "seed": 0,
        "adapter": None,
    }
    return load_model(**{**options, **changes})


def assert_same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    expected = left.state_dict()
    assert expected.keys() == right.state_dict().keys()
    for name, tensor in right.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_random_weights_depend_on_the_seed_alone_and_leave_the_random_state(family_config: Any, family: str) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = load(from_config=family_config(family), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert_same_weights(first, load(from_config=family_config(family), seed=5))
    other = load(from_config=family_config(family), seed=6)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert first.training and first.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_local_weights_are_loaded_whole_in_the_dtype_asked_for(tmp_path: Path, family_config: Any, dtype: Any) -> None:
    source = load(from_config=family_config("qwen2"), seed=3)
    source.save_pretrained(tmp_path)
    model = load(path=str(tmp_path), dtype=dtype, attention="eager")
    assert_same_weights(source.to(dtype), model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.training and model.config._attn_implementation == "eager"


def test_given_values_are_not_changed(family_config: Any) -> None:
    values = family_config("llama")
    load(from_config=values, dtype=torch.bfloat16)
    assert values == family_config("llama")


@pytest.mark.parametrize(
    ("family", "task", "head"),
    [
        ("bert", "masked_lm", "BertForMaskedLM"),
        ("bert", "sequence_classification", "BertForSequenceClassification"),
        ("llama", "sequence_classification", "LlamaForSequenceClassification"),
        ("vit", "image_classification", "ViTForImageClassification"),
    ],
)
def test_task_chooses_the_head(family_config: Any, family: str, task: str, head: str) -> None:
    assert type(load(from_config=family_config(family), task=task)).__name__ == head


def test_new_classification_head_is_seeded_and_its_body_is_loaded(tmp_path: Path, family_config: Any) -> None:
    source = load(from_config=family_config("bert"), task="masked_lm")
    source.save_pretrained(tmp_path)
    first, same, other = (load(path=str(tmp_path), task="sequence_classification", seed=seed) for seed in (4, 4, 5))
    assert_same_weights(first, same)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(
        first.bert.encoder.layer[1].output.dense.weight, source.bert.encoder.layer[1].output.dense.weight
    )


def test_config_beside_a_path_only_describes(tmp_path: Path, family_config: Any) -> None:
    source = load(from_config=family_config("llama"), seed=3)
    source.save_pretrained(tmp_path)
    assert_same_weights(source, load(path=str(tmp_path), from_config=family_config("llama"), seed=8))
    with pytest.raises(UserError, match=r"model\.from_config: describes another model .*hidden_size 64 instead of 32"):
        load(path=str(tmp_path), from_config=family_config("llama", hidden_size=64))


def test_weight_missing_from_the_files_is_refused(tmp_path: Path, family_config: Any) -> None:
    load(from_config=family_config("llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a llama .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(path=str(tmp_path))


def test_weights_of_other_shapes_are_refused(tmp_path: Path, family_config: Any) -> None:
    load(from_config=family_config("llama")).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "intermediate_size": 40}))
    with pytest.raises(UserError, match=r"model\.path: the weights in .* do not fit its config\.json"):
        load(path=str(tmp_path))


def test_damaged_weights_are_refused(tmp_path: Path, family_config: Any) -> None:
    load(from_config=family_config("llama")).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.path: cannot read the model in"):
        load(path=str(tmp_path))


def test_directory_without_weights_or_config_is_refused(tmp_path: Path, family_config: Any) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(path=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(family_config("llama")))
    with pytest.raises(UserError, match=r"(?s)model\.safetensors.*For random weights"):
        load(path=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a valid JSON file"):
        load(path=str(tmp_path))


def test_adapter_directory_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="PEFT adapter; give the directory of its base model"):
        load(path=str(tmp_path))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "some-lab/some-model"])
def test_path_that_is_nowhere_says_what_to_do(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"(?s)model\.path: {path} is not a local directory.*hf download NAME"):
        load(path=path)


def test_attention_that_the_family_lacks_is_refused(family_config: Any) -> None:
    with pytest.raises(UserError, match=r"model\.attention: bloom does not support sdpa .* to eager"):
        load(from_config=family_config("bloom"))
    assert load(from_config=family_config("bloom"), attention="eager").config._attn_implementation == "eager"


def test_head_that_the_family_lacks_is_refused(family_config: Any) -> None:
    with pytest.raises(UserError, match=r"model\.task: vit has no head for causal_lm; .* image_classification"):
        load(from_config=family_config("vit"))


def test_encoder_as_causal_model_is_refused(family_config: Any) -> None:
    with pytest.raises(UserError, match=r"model\.task: bert is an encoder"):
        load(from_config=family_config("bert"))
    model = load(from_config=family_config("bert", is_decoder=True)).eval()
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, -1] = 20
    torch.testing.assert_close(model(ids).logits[:, :-1], model(changed).logits[:, :-1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 3}, "model_type is missing"),
        ({"model_type": "lama"}, r"model_type 'lama' is not known .*llama"),
        ({"model_type": "llama", "num_hidden_layer": 2}, r"num_hidden_layer: not a key of llama; .* num_hidden_layers"),
        ({"model_type": "llama", "hidden_size": "big"}, r"model\.from_config: .*'hidden_size' expected int"),
        ({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}, "not a multiple"),
    ],
)
def test_bad_config_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(from_config=values)


def test_loaded_models_equal_those_of_transformers(tmp_path: Path, family_config: Any) -> None:
    ids = torch.arange(3, 19).reshape(2, 8)
    for family, task, auto in (
        ("mixtral", "causal_lm", AutoModelForCausalLM),
        ("roberta", "masked_lm", AutoModelForMaskedLM),
    ):
        load(from_config=family_config(family), task=task).save_pretrained(tmp_path / family)
        reference = auto.from_pretrained(tmp_path / family, attn_implementation="sdpa").eval()
        model = load(path=str(tmp_path / family), task=task).eval()
        assert torch.equal(model(ids).logits, reference(ids).logits)
