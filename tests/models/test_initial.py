"""Tensors of a model one by one: the same bits as of the whole model, in little memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY, own_task, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from framework.config import Config
from framework.errors import UserError
from framework.models import configured_model, initial, load_model
from framework.models.initial import sharded_model
from framework.training.memory import CpuMemoryTracker

# Sizes that fit tiny models, for methods whose defaults do not.
_ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "dora": {"rank": 4, "alpha": 8},
    "ia3": {},
    "vera": {"rank": 4},
    "shira": {"rank": 2},
    "osf": {},
    "fourierft": {"options": {"n_frequency": 20}},
}
_PISSA = {"kind": "lora", "rank": 4, "alpha": 8, "options": {"init_lora_weights": "pissa"}}


@pytest.fixture(autouse=True)
def tensors_of_two_elements_are_recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models have no tensor that would be large otherwise."""
    monkeypatch.setattr(initial, "_SMALLEST", 2)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def run_config(precision: str = "fp32", tokens: Path | None = None, **model: Any) -> Config:
    """A run's config with this model."""
    length = {} if model.get("task") == "image_classification" else {"sequence_length": 32}
    return Config.model_validate(
        {
            "model": {"attention": "eager", "tokenizer": None if tokens is None else str(tokens), **model},
            "run": {"output_dir": "unused", "seed": 3},
            "data": {"train": "unused.jsonl", **length},
            "optimizer": {"precision": precision, "learning_rate": 1e-3},
            "training": {"global_batch_size": 1, "micro_batch_size": 1, "max_steps": 1},
        }
    )


def family(name: str, task: str | None = None, **changes: Any) -> dict[str, Any]:
    """The config keys of a tiny random model."""
    config = tiny_config(name, **changes)
    return {"from_config": config.to_dict(), "task": task or TINY.get(name, {}).get("task") or own_task(config)}


def save(path: Path, model: dict[str, Any], **options: Any) -> str:
    """Save a random model in several files with an index."""
    source = load_model(
        path=None, **model, dtype=options.pop("dtype", torch.float32), attention="eager", seed=options.pop("seed", 7)
    )
    source.save_pretrained(path, max_shard_size="15KB")
    assert (path / "model.safetensors.index.json").is_file()
    return str(path)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_as_whole(config: Config) -> nn.Module:
    """Compare everything that training sees of a model; gives the one in parts."""
    whole = configured_model(config)
    state = torch.get_rng_state()
    model, tensors = sharded_model(config)
    assert tensors is not None
    assert type(model) is type(whole) and model.training
    expected, empty = named(whole), named(model)
    assert [*empty] == [*expected]
    assert [*model.state_dict()] == [*whole.state_dict()]
    assert {tensor.device.type for tensor in empty.values()} == {"meta"}
    for name, tensor in expected.items():
        own = empty[name]
        assert (own.shape, own.dtype, own.requires_grad) == (tensor.shape, tensor.dtype, tensor.requires_grad), name
        assert isinstance(own, nn.Parameter) == isinstance(tensor, nn.Parameter), name
    assert tied(model) == tied(whole)
    assert [module.training for module in model.modules()] == [module.training for module in whole.modules()]
    names = []
    for name, tensor in tensors:
        names.append(name)
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("cpu", expected[name].dtype, expected[name].shape)
        assert bits(tensor).equal(bits(expected[name])), name
    assert names == [*expected]
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_attributes(model, whole)
    return model


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def tied(model: nn.Module) -> list[list[str]]:
    """The names of each tensor that has several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def assert_same_attributes(model: nn.Module, whole: nn.Module) -> None:
    """Tensors that modules keep in plain attributes, such as the indices of some adapters, have their values."""
    for own, other in zip(model.modules(), whole.modules(), strict=True):
        for name, expected in vars(other).items():
            value = vars(own)[name]
            if isinstance(expected, Tensor):
                assert torch.equal(value, expected), name
            elif isinstance(expected, dict) and not name.startswith("_"):
                assert all(torch.equal(value[key], t) for key, t in expected.items() if isinstance(t, Tensor)), name


@pytest.mark.parametrize("name", TINY)
def test_every_family_drawn_and_stored(name: str, tmp_path: Path) -> None:
    model = family(name)
    assert_same_as_whole(run_config("pure_bf16", **model))
    assert_same_as_whole(run_config(path=save(tmp_path, model), task=model["task"]))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize(("stored", "precision"), [(torch.bfloat16, "fp32"), (torch.float16, "pure_bf16")])
def test_stored_weights_in_another_dtype(name: str, stored: torch.dtype, precision: str, tmp_path: Path) -> None:
    model = family(name)
    assert_same_as_whole(run_config(precision, path=save(tmp_path, model, dtype=stored), task=model["task"]))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "electra", "modernbert", "jamba"])
def test_head_that_the_files_lack_is_drawn(name: str, tmp_path: Path, tiny_tokenizer_path: Path) -> None:
    path = save(tmp_path, family(name, vocab_size=106))
    model = assert_same_as_whole(run_config(path=path, task="sequence_classification", tokens=tiny_tokenizer_path))
    assert model.config.pad_token_id == 0


def test_body_without_prefix_and_old_names_of_norms(tmp_path: Path) -> None:
    path = save(tmp_path, family("bert"))
    for file in tmp_path.glob("*.safetensors"):
        tensors = {_old_name(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = {_old_name(name): file for name, file in values["weight_map"].items()}
    index.write_text(json.dumps(values))
    assert_same_as_whole(run_config(path=path, task="masked_lm"))


def _old_name(name: str) -> str:
    name = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
    return name.replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize("equal", [True, False])
def test_tied_embeddings_that_are_both_stored(equal: bool, tmp_path: Path) -> None:
    path = save(tmp_path, family("llama", tie_word_embeddings=False))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    if equal:
        weights = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
        for file in tmp_path.glob("*.safetensors"):
            tensors = load_file(file)
            if "lm_head.weight" in tensors:
                tensors["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
                save_file(tensors, file, metadata={"format": "pt"})
    model = assert_same_as_whole(run_config(path=path))
    assert bool(tied(model)) == equal


@pytest.mark.parametrize("kind", _ADAPTERS)
def test_adapters(kind: str, tmp_path: Path) -> None:
    model = family("llama")
    adapter = {"kind": kind, **_ADAPTERS[kind]}
    assert_same_as_whole(run_config(path=save(tmp_path, model), adapter=adapter))
    assert_same_as_whole(run_config("pure_bf16", **model, adapter=adapter))


def test_adapter_that_changes_the_weights_and_modules_that_are_saved_with_one(tmp_path: Path) -> None:
    path = save(tmp_path, family("llama"))
    assert_same_as_whole(run_config(path=path, adapter=_PISSA))
    saved = {"kind": "lora", "rank": 4, "alpha": 8, "modules_to_save": ["lm_head", "embed_tokens"]}
    assert_same_as_whole(run_config(path=path, adapter=saved))


@pytest.mark.parametrize(
    ("name", "vocabulary", "kind"),
    [("llama", 99, "lora"), ("llama", 120, None), ("qwen2", 106, "lora"), ("gpt2", 99, None), ("gpt2", 120, "lora")],
)
def test_added_tokens(name: str, vocabulary: int, kind: str | None, tiny_tokenizer_path: Path, tmp_path: Path) -> None:
    options = {
        "added_tokens": ["<one>", "<two>"],
        "tokens": tiny_tokenizer_path,
        "adapter": kind and {"kind": kind, **_ADAPTERS[kind]},
    }
    tie = {"tie_word_embeddings": True} if name == "qwen2" else {}
    model = family(name, vocab_size=vocabulary, **tie)
    assert_same_as_whole(run_config(path=save(tmp_path, model), pad_vocabulary_to=16, **options))
    assert_same_as_whole(run_config("pure_bf16", **model, **options))


@pytest.mark.parametrize("added", [[], ["<tool>"]], ids=["", "added"])
def test_quantised_weights(added: list[str], tmp_path: Path, tiny_tokenizer_path: Path) -> None:
    drawn = family("llama", vocab_size=106)
    options = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "quantization": "nf4", "added_tokens": added}
    model = assert_same_as_whole(run_config("fp32_master", tiny_tokenizer_path, **drawn, **options))
    assert any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    stored = {"path": save(tmp_path, drawn), "task": drawn["task"]}
    assert_same_as_whole(run_config("pure_bf16", tiny_tokenizer_path, **stored, **options))


def test_rows_between_the_embedding_and_the_added_tokens_start_as_the_mean(tiny_tokenizer_path: Path) -> None:
    model = family("llama", vocab_size=99)
    plain = configured_model(run_config(**model)).get_input_embeddings().weight
    grown = configured_model(run_config(**model, added_tokens=["<one>"], tokens=tiny_tokenizer_path))
    rows = grown.get_input_embeddings().weight
    assert rows.shape[0] == 107 and torch.equal(rows[:99], plain)
    assert torch.equal(rows[99:], plain.mean(0).expand(8, -1))


def test_weights_in_other_files_are_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(path=None, **family("llama"), dtype=torch.float32, attention="eager", seed=7)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded, tensors = sharded_model(run_config(path=str(tmp_path)))
    assert tensors is None
    assert "every rank loads the whole model: its weights are not in safetensors files" in caplog.text
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_incomplete_and_misshapen_weights_are_refused_as_ever(tmp_path: Path) -> None:
    path = save(tmp_path, family("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    for file in tmp_path.glob("*.safetensors"):
        tensors = {key: value for key, value in load_file(file).items() if key != name}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a llama .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        sharded_model(run_config(path=path))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "intermediate_size": 40}))
    with pytest.raises(UserError, match=r"model\.path: the weights in .* do not fit its config\.json"):
        sharded_model(run_config(path=path))


class HostTracker(CpuMemoryTracker):
    """Counts what has memory: not the meta device."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "cpu":
            super()._count(storage)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_host_holds_one_tensor_and_what_makes_it(
    name: str, stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "_SMALLEST", 256)
    model = family(name, num_hidden_layers=16)
    config = run_config(path=save(tmp_path, model)) if stored else run_config(**model)
    with HostTracker() as tracker:
        empty, tensors = sharded_model(config)
        assert tensors is not None
        # Nothing but norms and tables of rotations.
        small = sum(tensor.nbytes for tensor in named(empty).values() if tensor.numel() < 256)
        sizes = [tensor.nbytes for _, tensor in tensors]
    # The whole tensor, and what its last operator takes: the experts that a merge puts together.
    assert tracker.peak <= small + 2 * max(sizes)
    assert sum(sizes) > 10 * (2 * max(sizes) + small)
