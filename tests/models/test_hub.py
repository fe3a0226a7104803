"""Models that bring their own code, revisions, and never asking the network."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from huggingface_hub import constants
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import framework
from framework.checkpoint import export_run
from framework.config import Config, load_config
from framework.data import load_tokenizer
from framework.data.images import load_image_processor
from framework.errors import UserError
from framework.hub import HubOptions
from framework.models import configured_classes, configured_image_processor, load_model, read_architecture
from framework.training.preview import dry_run

TRUSTED = HubOptions(trust_remote_code=True)
COMMIT = "0123456789abcdef0123456789abcdef01234567"

CONFIGURATION = """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own"
    vocab_size: int = 106
    hidden_size: int = 16
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    max_position_embeddings: int = 64
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_own import OwnConfig


def eager_attention_forward(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


class OwnAttention(nn.Module):
    is_causal = True

    def __init__(self, config):
        super().__init__()
        self.config, self.heads = config, config.num_attention_heads
        self.size = config.hidden_size // self.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, attention_mask=None):
        shape = (*hidden.shape[:2], self.heads, self.size)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv(hidden).chunk(3, -1))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.size**-0.5, dropout=0.0)
        return self.out(mixed.flatten(2))


class OwnBlock(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(config.hidden_size), OwnAttention(config)

    def forward(self, hidden, attention_mask=None):
        return hidden + self.attention(self.norm(hidden), attention_mask=attention_mask)


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([OwnBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = hidden + self.positions(position_ids)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=None,
            position_ids=position_ids,
        )
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class OwnForCausalLM(OwnPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
        return CausalLMOutputWithPast(logits=self.head(hidden))
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies a model's code to: one directory, since Python keeps the package that is in it."""
    directory = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", directory)
        patch.syspath_prepend(directory)
        yield


@pytest.fixture
def own_model(modules: None, tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A directory with a model of a class that transformers does not have, its code, weights and tokenizer."""
    path = tmp_path / "own"
    path.mkdir()
    (path / "configuration_own.py").write_text(CONFIGURATION)
    (path / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def load(path: Path | str, hub: HubOptions, **options: Any) -> Any:
    options = {"task": "causal_lm", "dtype": torch.float32, "attention": "sdpa", "seed": 0, **options}
    return load_model(path=str(path), from_config=None, hub=hub, **options)


def test_own_code_is_not_run_unless_asked_for(own_model: Path) -> None:
    (own_model / "configuration_own.py").write_text("raise SystemExit('ran')")
    message = rf"model\.path: {own_model} comes with Python files of its own .*model\.trust_remote_code is true"
    with pytest.raises(UserError, match=message):
        load(own_model, HubOptions())
    with pytest.raises(UserError, match=message):
        read_architecture(path=str(own_model), from_config=None)


def test_own_code_gives_the_stock_logits(own_model: Path) -> None:
    ids = torch.arange(3, 19).reshape(2, 8)
    model = load(own_model, TRUSTED)
    stock = AutoModelForCausalLM.from_pretrained(own_model, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert torch.equal(model.eval()(ids).logits, stock.eval()(ids).logits)
    described = read_architecture(path=str(own_model), from_config=None, hub=TRUSTED)
    assert (described.family, described.blocks, described.vocab_size) == ("own", 2, 106)


def own_config(path: Path, tmp_path: Path, **model: Any) -> Config:
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n} + 1 = ", "completion": str(n + 1)}) for n in range(24)) + "\n"
    )
    values = {
        "run": {"output_dir": str(tmp_path / "run")},
        "model": {"path": str(path), "trust_remote_code": True, **model},
        "data": {"train": str(tmp_path / "train.jsonl"), "sequence_length": 24},
        "selection": {"strategy": "supervised"},
        "retention": {"policy": "selective", "retain_linears": True},
        "optimizer": {"learning_rate": 0.01},
        "training": {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    return load_config(tmp_path / "config.json")


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 2, "alpha": 4.0}])
def test_own_code_trains_and_is_exported_with_it(
    own_model: Path, tmp_path: Path, adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = own_config(own_model, tmp_path, adapter=adapter)
    assert "own, 2 blocks" in dry_run(config)
    with caplog.at_level(logging.WARNING):
        result = framework.train(config)
    assert "falls back" not in caplog.text
    export_run(result.run_dir, output=tmp_path / "out", merge_adapter=adapter is not None)
    assert (tmp_path / "out" / "modeling_own.py").is_file()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    before = AutoModelForCausalLM.from_pretrained(own_model, trust_remote_code=True)
    changed = [
        name for name, tensor in before.state_dict().items() if not torch.equal(exported.state_dict()[name], tensor)
    ]
    assert "model.layers.0.attention.qkv.weight" in changed
    assert ("model.embed_tokens.weight" in changed) == (adapter is None)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("1")["input_ids"] == [7]


def test_tokenizer_with_own_code_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"model\.tokenizer: .* comes with Python files of its own"):
        load_tokenizer(str(tmp_path))


@pytest.fixture
def hub_cache(tmp_path: Path, family_config: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: Any) -> Path:
    """A hub cache that holds `lab/tiny` at the tag `v1`, as `hf download` leaves it; any request fails the test."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    repository = cache / "models--lab--tiny"
    snapshot = repository / "snapshots" / COMMIT
    model = load_model(
        path=None,
        from_config=family_config("llama", vocab_size=106),
        task="causal_lm",
        dtype=torch.float32,
        attention="sdpa",
        seed=4,
    )
    model.save_pretrained(snapshot)
    tiny_tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    return snapshot


def test_offline_reads_the_cached_revision(hub_cache: Path) -> None:
    hub = HubOptions(revision="v1", offline=True)
    model, stock = load("lab/tiny", hub), AutoModelForCausalLM.from_pretrained(hub_cache)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert read_architecture(path="lab/tiny", from_config=None, hub=hub).vocab_size == 106
    assert load_tokenizer("lab/tiny", hub=hub)("1")["input_ids"] == [7]
    assert constants.HF_HUB_OFFLINE is False


def test_offline_says_what_is_missing(hub_cache: Path) -> None:
    other = HubOptions(revision="v2", offline=True)
    advice = (
        rf"(?s)model\.offline is true, and the cache in {hub_cache.parents[2]} .*hf download lab/tiny --revision v2"
    )
    with pytest.raises(UserError, match=advice):
        load("lab/tiny", other)
    with pytest.raises(UserError, match=advice):
        load_tokenizer("lab/tiny", hub=other)
    (hub_cache / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"(?s)model\.path: lab/tiny.*model\.safetensors.*model\.offline is true"):
        load("lab/tiny", HubOptions(revision="v1", offline=True))


@pytest.fixture
def image_cache(hub_cache: Path, family_config: Callable[..., Any]) -> Path:
    """The same cache with `lab/eye`, a classifier of images with its processor, at the tag `v1`."""
    repository = hub_cache.parents[1].with_name("models--lab--eye")
    snapshot = repository / "snapshots" / COMMIT
    described = family_config("vit", id2label={"0": "cat", "1": "dog"})
    options = {"dtype": torch.float32, "attention": "sdpa", "seed": 4, "label_names": ["cat", "dog"]}
    load_model(path=None, from_config=described, task="image_classification", **options).save_pretrained(snapshot)
    BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    return snapshot


def test_offline_reads_processor_and_classes_of_the_cached_revision(image_cache: Path, tmp_path: Path) -> None:
    for name, colour in (("cat", 40), ("dog", 200)):
        for number in range(4):
            path = tmp_path / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 24), (colour, 3 * number, 0)).save(path)
    values = {
        "run": {"output_dir": str(tmp_path / "run")},
        "model": {"path": "lab/eye", "task": "image_classification", "revision": "v1", "offline": True},
        "data": {"train": str(tmp_path / "train")},
        "optimizer": {"learning_rate": 0.01},
        "training": {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path / "config.json")
    assert configured_classes(config) == ["cat", "dog"]
    assert type(configured_image_processor(config)) is BitImageProcessorPil
    assert "not here       image processor of lab/eye" in dry_run(config)
    result = framework.train(config)
    export_run(result.run_dir, output=tmp_path / "out")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")) is BitImageProcessorPil
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "cat", 1: "dog"}

    (image_cache / "preprocessor_config.json").unlink()
    with pytest.raises(
        UserError, match=r"(?s)load an image processor from lab/eye.*model\.offline is true.*--revision v1"
    ):
        configured_image_processor(config)


def test_image_processor_with_own_code_is_refused(tmp_path: Path, family_config: Callable[..., Any]) -> None:
    own = {"image_processor_type": "OwnProcessor", "auto_map": {"AutoImageProcessor": "own.OwnProcessor"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    (tmp_path / "config.json").write_text(json.dumps(family_config("vit")))
    with pytest.raises(UserError, match=r"model\.path: .* comes with Python files of its own"):
        load_image_processor(str(tmp_path), AutoConfig.from_pretrained(tmp_path))


def test_revision_of_a_directory_is_refused(hub_cache: Path) -> None:
    with pytest.raises(UserError, match=r"model\.revision: .* is a local directory"):
        load(hub_cache, HubOptions(revision="v1"))


def test_adapter_names_the_revision_of_its_base(hub_cache: Path, tmp_path: Path) -> None:
    config = own_config(
        "lab/tiny",
        tmp_path,
        trust_remote_code=False,
        revision="v1",
        offline=True,
        adapter={"kind": "lora", "rank": 2, "alpha": 4.0},
    )
    result = framework.train(config)
    export_run(result.run_dir, output=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("lab/tiny", "v1")
