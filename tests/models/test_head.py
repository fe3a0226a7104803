"""What a config says of its classes, and which tokens a classifier reads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.errors import UserError
from framework.models import load_model, read_architecture
from framework.models.configuration import read_model_config
from framework.models.head import describe_classes, known_classes, named_classes, pooling_of
from framework.retention import blocks_of, head_reads


def load(values: dict[str, Any] | None, path: Path | None = None, **options: Any) -> Any:
    options = {"task": "sequence_classification", "dtype": torch.float32, "attention": "sdpa", "seed": 0} | options
    return load_model(path=None if path is None else str(path), from_config=values, **options)


def test_classes_as_a_config_names_them(tmp_path: Path, family_config: Any) -> None:
    assert named_classes(None, family_config("bert")) is None
    assert named_classes(None, family_config("bert", num_labels=4)) == 4
    shuffled = {str(number): "abcdefghijk"[number] for number in (1, 10, 0, 2, 9, 8, 3, 7, 4, 6, 5)}
    assert named_classes(None, family_config("bert", id2label=shuffled)) == list("abcdefghijk")
    load(family_config("bert"), label_names=["no", "yes", "so"]).save_pretrained(tmp_path)
    assert named_classes(str(tmp_path), None) == ["no", "yes", "so"]
    load(family_config("bert", num_labels=3)).save_pretrained(tmp_path)
    assert named_classes(str(tmp_path), family_config("bert", num_labels=9)) == 3
    load(family_config("bert"), task="masked_lm").save_pretrained(tmp_path)
    assert named_classes(str(tmp_path), None) is None


@pytest.mark.parametrize(
    ("id2label", "problem"),
    [
        (["no", "yes"], 'must be an object from class numbers to names, such as {"0": "no", "1": "yes"}'),
        ("no", 'must be an object from class numbers to names, such as {"0": "no", "1": "yes"}'),
        ({"x": "no"}, "'x' is no class number"),
        ({"0": "no", "00": "yes"}, "'00' is no class number"),
        ({"0": None}, "the name of class 0 is null"),
        ({"0": "no", "2": "yes"}, "the numbers are 0, 2; classes are numbered from 0 without gaps"),
        ({"-1": "no", "0": "yes"}, "'-1' is no class number"),
        ({"0": "a", "1": "b", "2": "a", "3": "b"}, "several classes have the names a, b; give each its own"),
    ],
)
def test_classes_that_a_config_names_badly(tmp_path: Path, family_config: Any, id2label: Any, problem: str) -> None:
    values = family_config("bert", id2label=id2label)
    with pytest.raises(UserError) as caught:
        named_classes(None, values)
    assert str(caught.value) == f"model.from_config.id2label: {problem}"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        named_classes(str(tmp_path), None)
    assert str(caught.value) == f"model.path: config.json: id2label: {problem}"
    if "several" not in problem and "gaps" not in problem:  # what transformers takes, other tasks may have
        with pytest.raises(UserError, match=r"model\.from_config\.id2label: "):
            read_model_config(None, values)


def test_a_config_whose_classes_are_null_says_nothing_of_them(family_config: Any) -> None:
    values = family_config("bert", id2label=None)
    assert named_classes(None, values) is None
    assert named_classes(None, {**values, "num_labels": 3}) == 3
    assert read_model_config(None, values).num_labels == 2


def test_a_model_directory_whose_classes_are_a_list(tmp_path: Path, family_config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family_config("bert", id2label=["no", "yes"])))
    with pytest.raises(UserError, match=r"model\.path: cannot read the model in .*(id2label|'list' object)"):
        read_model_config(str(tmp_path), None)


def test_what_is_known_of_the_classes() -> None:
    assert known_classes(None, None) == (None, None)
    assert known_classes(None, 3) == (None, 3)
    assert known_classes(None, ["a", "b"]) == (["a", "b"], None)
    assert known_classes(["x", "y"], 2) == (["x", "y"], None)
    assert known_classes(["x", "y"], ["x", "y"]) == (["x", "y"], None)
    with pytest.raises(UserError, match=r"data\.label_names: 2 names, but the model's config has 3 classes"):
        known_classes(["x", "y"], 3)
    with pytest.raises(UserError, match=r"data\.label_names: class 1 is 'y', but 'z' in the model's config"):
        known_classes(["x", "y"], ["x", "z"])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_classes_and_padding_are_written_into_the_model(family_config: Any, family: str) -> None:
    values = {key: value for key, value in family_config(family).items() if key != "pad_token_id"}
    names = ["no", "yes", "perhaps"]
    plain = load({**values, "pad_token_id": None}, label_names=names)
    model = load({**values, "pad_token_id": None}, label_names=names, pad_token_id=2)
    assert model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert model.config.label2id == {"no": 0, "yes": 1, "perhaps": 2}
    assert (model.config.num_labels, model.config.problem_type) == (3, "single_label_classification")
    assert model.config.pad_token_id == 2
    # The padding token's row is initialised, and trained, like any other.
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert model.get_input_embeddings().padding_idx is None
    assert model(torch.tensor([[5, 6, 7], [5, 2, 2]])).logits.shape == (2, 3)


def test_another_padding_token_than_the_models_is_refused(family_config: Any) -> None:
    with pytest.raises(UserError, match=r"pads with token 2, but the model's config says pad_token_id 0"):
        load(family_config("llama"), pad_token_id=2)
    assert load(family_config("llama"), pad_token_id=0).config.pad_token_id == 0


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problems_than_one_class_are_refused(family_config: Any, problem: str) -> None:
    config = read_model_config(None, family_config("bert", problem_type=problem))
    with pytest.raises(UserError, match=f"problem_type '{problem}' is not supported"):
        describe_classes(config, task="sequence_classification", label_names=["a", "b"])
    assert describe_classes(config, task="masked_lm", label_names=None).problem_type == problem


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
PIXELS = {**SMALL, "image_size": 16, "patch_size": 4}
CLASSIFIERS = [
    ("bert", TEXT, "first"),
    ("roberta", TEXT, "first"),
    ("electra", {**TEXT, "embedding_size": 16}, "first"),
    ("modernbert", {**TEXT, "classifier_pooling": "cls"}, "first"),
    ("modernbert", {**TEXT, "classifier_pooling": "mean"}, "mean"),
    ("llama", {**TEXT, "num_key_value_heads": 1}, "last"),
    ("qwen2", {**TEXT, "num_key_value_heads": 1}, "last"),
    ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "pad_token_id": 0}, "last"),
    ("vit", PIXELS, "first"),
    ("deit", {**PIXELS, "architectures": ["DeiTForImageClassification"]}, "first"),
    ("vit_msn", PIXELS, "first"),
    ("dinov2", {key: value for key, value in PIXELS.items() if key != "intermediate_size"}, "mean"),
    ("dinov2_with_registers", {key: value for key, value in PIXELS.items() if key != "intermediate_size"}, "mean"),
    ("beit", PIXELS, "mean"),
    ("beit", {**PIXELS, "use_mean_pooling": False}, "first"),
    ("siglip", {"vision_config": PIXELS}, "mean"),
    ("clip", {"vision_config": PIXELS, "text_config": TEXT}, "mean"),
    ("ijepa", PIXELS, "mean"),
]


def tokens_read(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens the head reads, one after the other, bool `[batch, tokens]`."""
    shapes: list[torch.Size] = []
    last = [*blocks_of(model).values()][-1]
    handle = last.register_forward_hook(
        lambda _, args, out: shapes.append((out[0] if isinstance(out, tuple) else out).shape)
    )
    with torch.random.fork_rng(), torch.no_grad():
        model(**inputs)
    handle.remove()
    batch, tokens = shapes[0][:2]
    read = torch.zeros(batch, tokens, dtype=torch.bool)
    for row, token in itertools.product(range(batch), range(tokens)):
        one = torch.zeros_like(read)
        one[row, token] = True
        read[row, token] = head_reads(model, inputs, one)
    return read


@pytest.mark.parametrize(("family", "values", "pooling"), CLASSIFIERS)
def test_a_head_reads_what_pooling_says(family: str, values: dict[str, Any], pooling: str) -> None:
    images = "image_size" in values or "vision_config" in values
    task = "image_classification" if images else "sequence_classification"
    model = load({"model_type": family, **values}, task=task, label_names=["a", "b", "c"])
    if images:
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    else:
        ids = torch.tensor([[5, 6, 7, 8, 9], [7, 6, 5, 0, 0]])
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    random = torch.get_rng_state()
    read = tokens_read(model, inputs)
    assert pooling_of(model) == pooling
    if pooling == "mean":
        padding = [] if images else [[1, 3], [1, 4]]
        # Means of patches leave the class token out, or what else is no patch.
        assert (~read).nonzero().tolist()[-len(padding) :] == padding if padding else bool(read[:, 5:].all())
    else:
        assert read.nonzero().tolist() == ([[0, 0], [1, 0]] if pooling == "first" else [[0, 4], [1, 2]])
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_tokens_of_an_image_are_counted_without_weights(family_config: Any) -> None:
    describe = {"path": None, "task": "image_classification", "attention": "sdpa"}
    found = read_architecture(from_config=family_config("vit"), pixels=(3, 16, 16), **describe)
    assert (found.image_tokens, found.pooling, found.token_types) == (5, "first", False)
    registers = {"model_type": "dinov2_with_registers", "hidden_size": 16, "num_attention_heads": 2}
    registers |= {"num_hidden_layers": 1, "patch_size": 4, "image_size": 16, "num_register_tokens": 3}
    assert read_architecture(from_config=registers, pixels=(3, 16, 20), **describe).image_tokens == 4 * 5 + 1 + 3
    with pytest.raises(
        UserError, match=r"makes images of 32 x 24 pixels and 3 channels, which the model does not take"
    ):
        read_architecture(from_config=family_config("vit"), pixels=(3, 24, 32), **describe)


def test_a_saved_head_of_other_classes_does_not_load(tmp_path: Path, family_config: Any) -> None:
    load(family_config("bert"), label_names=["a", "b", "c"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(family_config("bert")))
    with pytest.raises(UserError, match=r"model\.path: the weights in .* do not fit its config\.json"):
        load(None, tmp_path, label_names=["a", "b"])
