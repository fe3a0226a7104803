"""Adapters of every method: resumed, exported for stock PEFT, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from saved_weights import save_weights
from transformers import AutoModelForCausalLM

from framework.checkpoint import WEIGHTS_FILE, export_run, find_step, load_weights, save_checkpoint
from framework.config import load_config
from framework.config.adapters import ADAPTER_METHODS
from framework.errors import UserError
from framework.models import configured_architecture, configured_model, count_parameters, load_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
IDS = torch.arange(3, 19).reshape(2, 8)
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 4.0},
    "dora": {"rank": 2, "alpha": 4.0},
    "ia3": {},
    "loha": {"rank": 2, "alpha": 4.0},
    "lokr": {"rank": 2, "alpha": 4.0},
    "vera": {"rank": 2},
    "randlora": {"rank": 2, "alpha": 40.0},
    "oft": {"options": {"oft_block_size": 4}},
    "boft": {"options": {"boft_block_size": 4}},
    "hra": {"rank": 2},
    "fourierft": {"options": {"n_frequency": 20, "scaling": 1.0}},
    "ln_tuning": {},
    "shira": {"rank": 2},
    "miss": {"rank": 2},
    "trainable_tokens": {"options": {"token_indices": [*range(3, 12)]}},
    "beft": {},
    "c3a": {"options": {"block_size": 8}},
    "deft": {"rank": 2},
    "delora": {"rank": 2},
    "glora": {"rank": 2},
    "gralora": {"rank": 2, "alpha": 4.0},
    "hira": {"rank": 2},
    "osf": {},
    "peanut": {"rank": 2},
    "psoft": {"rank": 2, "alpha": 4.0},
    "pvera": {"rank": 2},
    "road": {"options": {"group_size": 4}},
    "supertuning": {},
    "tinylora": {"rank": 2},
    "unilora": {"rank": 2},
    "vblora": {"rank": 2, "options": {"num_vectors": 16, "vector_length": 4}},
    "waveft": {"options": {"n_frequency": 20}},
}
CASES = {
    **{kind: (kind, settings) for kind, settings in SMALL.items()},
    "lora-rslora": ("lora", {"rank": 4, "alpha": 4.0, "options": {"use_rslora": True}}),
    "lora-orthogonal": ("lora", {"rank": 2, "alpha": 4.0, "options": {"init_lora_weights": "orthogonal"}}),
    "lora-pissa": ("lora", {"rank": 2, "alpha": 4.0, "options": {"init_lora_weights": "pissa"}}),
    "lora-pissa-random": ("lora", {"rank": 2, "alpha": 4.0, "options": {"init_lora_weights": "pissa_niter_4"}}),
    "lora-pissa-rslora": (
        "lora",
        {"rank": 2, "alpha": 4.0, "options": {"init_lora_weights": "pissa", "use_rslora": True}},
    ),
    "lora-olora": ("lora", {"rank": 2, "alpha": 4.0, "options": {"init_lora_weights": "olora"}}),
    "oft-rank": ("oft", {"rank": 4}),
}
# A LoRA that took its start out of the base weights is written as one for the base as it is: equal but for rounding.
CONVERTED = {"lora-pissa", "lora-pissa-random", "lora-pissa-rslora", "lora-olora"}
UNMERGEABLE = {"beft": "has no bias"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    load_model(
        path=None, from_config=LLAMA, task="causal_lm", dtype=torch.float32, attention="sdpa", seed=0
    ).save_pretrained(path)
    return path


def write_model(directory: Path, model: torch.nn.Module) -> list[Path]:
    save_weights(directory / WEIGHTS_FILE, model)
    return [directory / WEIGHTS_FILE]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def make_run(run_dir: Path, base: Path, kind: str, settings: dict[str, Any]) -> Any:
    """A run directory as training leaves it, its config and the trained model."""
    values = {
        "run": {"output_dir": str(run_dir), "seed": 3},
        "model": {"path": str(base), "adapter": {"kind": kind, **settings}},
        "data": {"train": "unused.jsonl", "sequence_length": 16},
        "optimizer": {"learning_rate": 0.001},
        "training": {"max_steps": 9, "global_batch_size": 1, "micro_batch_size": 1},
    }
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(values))
    config = load_config(run_dir / "config.json")
    trained = configured_model(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(
        run_dir,
        5,
        write_shards=lambda directory: write_model(directory, trained),
        state={},
        manifest={},
        keep_last=5,
    )
    return config, trained.eval()


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.checkpoint.export.configured_tokenizer", lambda config: None)


def test_every_method_is_here() -> None:
    assert SMALL.keys() == ADAPTER_METHODS.keys()


@pytest.mark.parametrize("case", CASES)
def test_adapter_resumes_loads_in_stock_peft_and_merges(tmp_path: Path, base: Path, case: str) -> None:
    kind, settings = CASES[case]
    config, trained = make_run(tmp_path / "run", base, kind, settings)
    expected = logits(trained)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)

    torch.manual_seed(12345)
    resumed = configured_model(config)
    load_weights(find_step(tmp_path / "run", 5).weights(), resumed)
    assert torch.equal(logits(resumed), expected)

    planned = configured_architecture(config, None)
    assert (planned.parameters, planned.trainable_parameters) == count_parameters(trained)

    export_run(tmp_path / "run", output=tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    tolerance = 1e-4 if case in CONVERTED else 0.0
    torch.testing.assert_close(logits(stock), expected, rtol=tolerance, atol=tolerance)

    if case in UNMERGEABLE:
        with pytest.raises(UserError, match=rf"--merge-adapter: PEFT cannot merge this {kind} .*{UNMERGEABLE[case]}"):
            export_run(tmp_path / "run", output=tmp_path / "merged", merge_adapter=True)
        assert not (tmp_path / "merged").exists()
        return
    export_run(tmp_path / "run", output=tmp_path / "merged", merge_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
