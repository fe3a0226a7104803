"""Weights files: bit-equal round trips, tied and frozen tensors, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saved_weights import save_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from framework.checkpoint.stored import StoredFragments
from framework.checkpoint.tensor_files import write_tensors
from framework.checkpoint.weights import load_weights, map_weights
from framework.errors import UserError


def tiny_llama(*, tied: bool, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            tie_word_embeddings=tied,
        )
    )


def adapted(model: LlamaForCausalLM, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    return get_peft_model(model, config)


def test_every_dtype_and_layout_reads_back_with_the_library(tmp_path: Path) -> None:
    base = torch.arange(24).reshape(4, 6)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    tensors = {str(dtype): base.to(dtype) for dtype in [*dtypes, torch.int8, torch.uint8]}
    tensors |= {
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": base.t().float(),
        "eighth": base.to(torch.float8_e4m3fn),
    }
    write_tensors(tmp_path / "all.safetensors", tensors)
    loaded = load_file(tmp_path / "all.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].double(), tensor.double()), name


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_equal_and_tied_weights_are_stored_once(tmp_path: Path, tied: bool) -> None:
    source, target = tiny_llama(tied=tied), tiny_llama(tied=tied, seed=1)
    save_weights(tmp_path / "model.safetensors", source)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    load_weights(StoredFragments(tmp_path, "model"), target)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
    assert (target.lm_head.weight is target.model.embed_tokens.weight) == tied


def test_tied_weight_is_found_under_its_other_name(tmp_path: Path) -> None:
    source, target = tiny_llama(tied=True), tiny_llama(tied=True, seed=1)
    tensors = dict(source.named_parameters())
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_tensors(tmp_path / "model.safetensors", tensors)
    load_weights(StoredFragments(tmp_path, "model"), target)
    assert torch.equal(target.model.embed_tokens.weight, source.lm_head.weight)


def test_adapter_file_holds_trainable_parameters_only(tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    source, target = adapted(copy.deepcopy(base), seed=1), adapted(copy.deepcopy(base), seed=2)
    save_weights(tmp_path / "model.safetensors", source)
    trainable = {name for name, parameter in source.named_parameters() if parameter.requires_grad}
    assert load_file(tmp_path / "model.safetensors").keys() == trainable
    assert any("lora_A" in name for name in trainable) and any("modules_to_save" in name for name in trainable)
    load_weights(StoredFragments(tmp_path, "model"), target)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_persistent_buffers_are_stored_and_others_are_not(tmp_path: Path) -> None:
    def build(value: float) -> nn.Module:
        module = nn.Sequential(nn.BatchNorm1d(3))
        module[0].running_mean.fill_(value)
        module[0].register_buffer("table", torch.full((2,), value), persistent=False)
        return module

    source, target = build(3.0), build(5.0)
    save_weights(tmp_path / "model.safetensors", source)
    assert "0.table" not in load_file(tmp_path / "model.safetensors")
    load_weights(StoredFragments(tmp_path, "model"), target)
    assert target[0].running_mean.tolist() == [3.0, 3.0, 3.0]
    assert target[0].table.tolist() == [5.0, 5.0]


def test_weights_of_another_model_are_refused_and_nothing_is_copied(tmp_path: Path) -> None:
    tensors = dict(tiny_llama(tied=False).named_parameters())
    del tensors["model.norm.weight"]
    tensors["stranger"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(3, 32)
    write_tensors(tmp_path / "model.safetensors", tensors)
    target = tiny_llama(tied=False, seed=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(StoredFragments(tmp_path, "model"), target)
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "unexpected: stranger" in message
    assert "lm_head.weight [3, 32] in the file, [64, 32] in the model" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_untied_model_refuses_the_file_of_a_tied_one(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.safetensors", tiny_llama(tied=True))
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        load_weights(StoredFragments(tmp_path, "model"), tiny_llama(tied=False))


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, tiny_llama(tied=True))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_weights(StoredFragments(tmp_path, "model"), tiny_llama(tied=True))


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    tensors = {"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(5, dtype=torch.float64), "c": torch.zeros(1)}
    write_tensors(path, tensors)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for name, tensor in tensors.items():
        start = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
        assert start % tensor.element_size() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_mapped_model_holds_the_weights_without_reading_the_frozen_ones(tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "model.safetensors"
    source = tiny_llama(tied=tied)
    save_weights(path, source)
    with torch.device("meta"):
        target = tiny_llama(tied=tied)
    map_weights(StoredFragments(tmp_path, "model"), target)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name

    source = adapted(source, seed=3)
    save_weights(path, source)
    with torch.device("meta"):
        target = adapted(tiny_llama(tied=tied), seed=4)
    map_weights(StoredFragments(tmp_path, "model"), target)
    for name, tensor in target.named_parameters():
        assert tensor.is_meta == (not tensor.requires_grad), name
        assert tensor.is_meta or torch.equal(tensor, source.get_parameter(name)), name


def test_mapping_refuses_the_weights_of_another_model(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.safetensors", tiny_llama(tied=True))
    with torch.device("meta"):
        target = tiny_llama(tied=False)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        map_weights(StoredFragments(tmp_path, "model"), target)


def test_file_has_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(2).bfloat16(), "c": torch.arange(4)}
    write_tensors(tmp_path / "ours.safetensors", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
