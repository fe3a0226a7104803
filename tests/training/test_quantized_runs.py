"""QLoRA with 8-bit AdamW from a config: it learns, resumes to the bit, is planned in bytes, and is exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import framework
from framework import extras
from framework.checkpoint import export_run
from framework.errors import UserError
from framework.models import load_model
from framework.models.quantization import packed_bytes
from framework.training.preview import dry_run

ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 106,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Rank 64, so that most of its matrices have the 4096 elements from which moments are held in 8 bits.
ADAPTER = {"kind": "lora", "rank": 64, "alpha": 64.0}


@pytest.fixture
def base(tmp_path):
    """A directory with the weights of a base model."""
    path = tmp_path / "base"
    options = {"path": None, "from_config": LLAMA, "task": "causal_lm", "attention": "sdpa", "seed": 0}
    load_model(**options, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def qlora(make_config, settings, base):
    """A config of QLoRA, with changes."""
    settings["model"] |= {"path": str(base), "from_config": None, "adapter": ADAPTER, "quantization": "nf4"}
    settings["optimizer"] |= {"name": "adamw_8bit", "learning_rate": 0.003}
    settings["checkpoint"] = {"every_steps": 3}
    return make_config


def losses(result):
    lines = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def stored(result, name):
    return load_file(result.run_dir / "checkpoints" / "step-00000006" / name)


@pytest.mark.parametrize("precision", ["fp32", "fp32_master"])
def test_it_learns_and_resumes_to_the_bit(qlora, settings, precision):
    changes = {"optimizer__precision": precision}
    whole = framework.train(qlora(**changes))
    assert losses(whole)[-1] < losses(whole)[0] - 0.3
    settings["run"]["output_dir"] += "-again"
    framework.train(qlora(**changes, training__max_steps=3))
    torch.manual_seed(99)
    resumed = framework.train(qlora(**changes, training__max_steps=6))
    assert losses(resumed) == losses(whole) and resumed.eval_loss == whole.eval_loss
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = stored(resumed, name), stored(whole, name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert all("lora_" in name for name in stored(whole, "model.safetensors"))


def test_its_losses_are_close_to_those_in_float32(qlora, settings):
    quantized = losses(framework.train(qlora()))
    settings["run"]["output_dir"] += "-float"
    plain = losses(framework.train(qlora(model__quantization=None, optimizer__name="adamw")))
    assert max(abs(a - b) for a, b in zip(quantized, plain, strict=True)) < 0.1
    assert quantized != plain


def test_a_dry_run_counts_the_bytes(qlora):
    text = dry_run(qlora())
    sizes = 2 * [64 * 64, 64 * 64, 64 * 32, 64 * 32, 64 * 96, 64 * 96, 64 * 96]
    packed = sum(map(packed_bytes, sizes))
    outside = 2 * 106 * 64 + 5 * 64
    # lora_A and lora_B of rank 64: as many rows or columns as the layer has inputs and outputs.
    lora = 2 * [64, 64, 64, 64, 64, 32, 64, 32, 64, 96, 64, 96, 96, 64]
    state = sum(2 * 64 * n + 8 * (64 * n // 256) if 64 * n >= 4096 else 8 * 64 * n for n in lora)
    trained = 64 * sum(lora)
    assert f"quantization   nf4: {sum(sizes):,} parameters in {8 * packed / sum(sizes):.3f} bits each" in text
    memory = text[text.index("\nmemory") :].splitlines()[1]
    kibibytes = [f"{size / 1024:.2f} KiB" for size in (4 * (outside + trained) + packed, 4 * trained, state)]
    for name, size in zip(("weights", "gradients", "optimizer state"), kibibytes, strict=True):
        assert f"{name} {size}" in memory


def test_the_adapter_loads_beside_its_base_and_is_merged_into_it(qlora, base, tmp_path, monkeypatch):
    framework.train(qlora())
    # Neither needs the package.
    monkeypatch.setattr("framework.models.quantization.bitsandbytes", None)
    export_run(tmp_path / "run", output=tmp_path / "adapter")
    export_run(tmp_path / "run", output=tmp_path / "merged", merge_adapter=True)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base)
    ids = torch.arange(3, 19).reshape(2, 8)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(stock(ids).logits, stock.unload()(ids).logits, atol=1e-2)


def test_without_bitsandbytes_it_is_refused_before_anything_is_loaded(qlora, monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda: False)
    with pytest.raises(UserError) as refused:
        framework.train(qlora())
    assert str(refused.value) == (
        'model.quantization "nf4" and optimizer.name "adamw_8bit": bitsandbytes is not installed here; '
        'pip install "selectrain[quantization]", or set it otherwise'
    )
    assert refused.value.exit_code == 2
    extras.check_bitsandbytes(qlora(model__quantization=None, optimizer__name="adamw"))


def test_a_torch_that_cannot_shard_bytes_is_named(qlora, monkeypatch):
    monkeypatch.setattr(extras, "version", lambda package: "2.11.0+cpu")
    extras.check_bitsandbytes(qlora())
    with pytest.raises(UserError, match=r'"nf4" with sharding\.engine "fsdp" needs torch 2\.13, and here is 2\.11\.0'):
        extras.check_bitsandbytes(qlora(sharding__engine="fsdp"))
    monkeypatch.setattr(extras, "version", lambda package: "2.13.0")
    extras.check_bitsandbytes(qlora())


def test_a_command_that_needs_no_bitsandbytes_does_not_import_it(qlora, write_config):
    """PEFT would: it takes seconds, and may write to the error stream."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('peft' in sys.modules, 'bitsandbytes' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = [str(ROOT / "launchers" / "train.py"), "--config", str(write_config()), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True, env=environment, timeout=240
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\nTrue False\n")
