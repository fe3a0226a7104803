"""Exports load in stock transformers and PEFT, with the logits of the trained model."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ROOT, fork_script
from peft import PeftModel
from saved_weights import save_weights
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from framework.checkpoint import WEIGHTS_FILE, export_run, save_checkpoint
from framework.checkpoint import export as export_module
from framework.config import load_config
from framework.errors import RunError, UserError
from framework.models import load_model

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
TIED = {**LLAMA, "tie_word_embeddings": True}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
BERT = {"model_type": "bert", **{key: LLAMA[key] for key in list(LLAMA)[1:5]}, "vocab_size": 64}
LORA = {"kind": "lora", "rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]}
IDS = torch.arange(3, 19).reshape(2, 8)
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def make_tokenizer(path: Path) -> str:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"t{index}": index for index in range(4, 60)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return str(path)


def make_run(run_dir: Path, *, steps: tuple[int, ...] = (5,), precision: str = "fp32", **model: Any) -> Any:
    """A run directory as training leaves it, and the trained model of its last step."""
    values = {
        "run": {"output_dir": str(run_dir), "seed": 3},
        "model": {"tokenizer": make_tokenizer(run_dir.parent / "tokenizer"), **model},
        "data": {"train": "unused.jsonl", "sequence_length": 16},
        "optimizer": {"learning_rate": 0.001, "precision": precision},
        "training": {"max_steps": 9, "global_batch_size": 1, "micro_batch_size": 1},
    }
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(values))
    config = load_config(run_dir / "config.json")
    trained = load_model(
        path=config.model.path,
        from_config=config.model.from_config,
        task=config.model.task,
        dtype=getattr(torch, config.weights_dtype),
        attention=config.model.attention,
        seed=config.run.seed,
        adapter=config.model.adapter,
    )
    generator = torch.Generator().manual_seed(11)
    for step in steps:
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        save_checkpoint(
            run_dir,
            step,
            write_shards=lambda directory: write_model(directory, trained),
            state={},
            manifest={},
            keep_last=5,
        )
    return trained.eval()


def write_model(directory: Path, model: torch.nn.Module) -> list[Path]:
    save_weights(directory / WEIGHTS_FILE, model)
    return [directory / WEIGHTS_FILE]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
@pytest.mark.parametrize("values", [LLAMA, TIED, MIXTRAL], ids=["untied", "tied", "experts"])
def test_full_model_has_the_same_logits_and_generates(tmp_path: Path, values: dict[str, Any], precision: str) -> None:
    trained = make_run(tmp_path / "run", from_config=values, precision=precision)
    export_run(tmp_path / "run", output=tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    assert exported.dtype == trained.dtype
    assert torch.equal(logits(exported), logits(trained))
    tied = exported.lm_head.weight is exported.model.embed_tokens.weight
    assert tied == values.get("tie_word_embeddings", False)
    assert exported.generation_config.eos_token_id == 2 and exported.generation_config.pad_token_id == 0
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(exported.generate(IDS, **options), trained.generate(IDS, **options))


def test_tokenizer_and_chat_template_are_exported(tmp_path: Path) -> None:
    make_run(tmp_path / "run", from_config=LLAMA)
    export_run(tmp_path / "run", output=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("t5 t59 </s>")["input_ids"] == [5, 59, 2]
    assert tokenizer.chat_template == TEMPLATE


def test_step_is_chosen_or_the_newest(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "run", from_config=LLAMA, steps=(5, 9))
    export_run(tmp_path / "run", output=tmp_path / "newest")
    export_run(tmp_path / "run", step=5, output=tmp_path / "fifth")
    newest, fifth = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("newest", "fifth"))
    assert torch.equal(logits(newest), logits(trained))
    assert not torch.equal(logits(fifth), logits(trained))


def test_base_with_weights_gives_config_and_generation_config_and_is_not_read(tmp_path: Path) -> None:
    base = load_model(path=None, from_config=TIED, task="causal_lm", dtype=torch.float32, attention="sdpa", seed=0)
    base.generation_config = GenerationConfig(eos_token_id=[2, 7], pad_token_id=0, bos_token_id=1, max_new_tokens=3)
    base.save_pretrained(tmp_path / "base")
    trained = make_run(tmp_path / "run", path=str(tmp_path / "base"))
    (tmp_path / "base" / "model.safetensors").unlink()
    export_run(tmp_path / "run", output=tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(exported), logits(trained))
    assert exported.generation_config.eos_token_id == [2, 7] and exported.generation_config.max_new_tokens == 3


@pytest.mark.parametrize(
    ("values", "saved"),
    [(LLAMA, []), (TIED, []), (LLAMA, ["embed_tokens", "lm_head"]), (TIED, ["embed_tokens"]), (TIED, ["lm_head"])],
    ids=["untied", "tied", "untied-saved", "tied-embedding-saved", "tied-head-saved"],
)
def test_adapter_loads_on_its_base_and_merges(tmp_path: Path, values: dict[str, Any], saved: list[str]) -> None:
    base = load_model(path=None, from_config=values, task="causal_lm", dtype=torch.float32, attention="sdpa", seed=0)
    base.save_pretrained(tmp_path / "base")
    trained = make_run(tmp_path / "run", path=str(tmp_path / "base"), adapter={**LORA, "modules_to_save": saved})
    expected = logits(trained)
    assert not torch.equal(expected, logits(base))

    export_run(tmp_path / "run", output=tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    assert (tmp_path / "adapter" / "generation_config.json").is_file()
    fresh = AutoModelForCausalLM.from_pretrained(written["base_model_name_or_path"])
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), expected)

    export_run(tmp_path / "run", output=tmp_path / "merged", merge_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    generated = merged.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated.shape == (2, 12)


def test_adapter_beside_random_weights_merges_into_the_same_ones(tmp_path: Path, caplog: Any) -> None:
    trained = make_run(tmp_path / "run", from_config=LLAMA, adapter=LORA)
    export_run(tmp_path / "run", output=tmp_path / "adapter")
    assert "use --merge-adapter" in caplog.text
    export_run(tmp_path / "run", output=tmp_path / "merged", merge_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "auto"),
    [("masked_lm", AutoModelForMaskedLM), ("sequence_classification", AutoModelForSequenceClassification)],
)
def test_other_heads(tmp_path: Path, task: str, auto: Any) -> None:
    trained = make_run(tmp_path / "run", from_config=BERT, task=task)
    export_run(tmp_path / "run", output=tmp_path / "out")
    exported = auto.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    assert torch.equal(logits(exported), logits(trained))


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", from_config=LLAMA)
    with pytest.raises(UserError, match="is not a run directory"):
        export_run(tmp_path / "nowhere", output=tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint of step 6; complete ones: 5"):
        export_run(tmp_path / "run", step=6, output=tmp_path / "out")
    with pytest.raises(UserError, match=r"--merge-adapter: .* there is no adapter"):
        export_run(tmp_path / "run", output=tmp_path / "out", merge_adapter=True)
    with pytest.raises(UserError, match="is not an empty directory"):
        export_run(tmp_path / "run", output=tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_empty_output_directory_is_used(tmp_path: Path) -> None:
    make_run(tmp_path / "run", from_config=LLAMA)
    (tmp_path / "out").mkdir()
    assert export_run(tmp_path / "run", output=tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_full_disk_leaves_no_half_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", from_config=LLAMA)
    before = sorted(tmp_path.iterdir())

    def full(model: Any, start: Any, companions: Any, directory: Path) -> None:
        (directory / "half").write_bytes(b"x")
        raise RuntimeError("I/O error: No space left on device (os error 28)") from OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(export_module, "_write", full)
    with pytest.raises(RunError, match=r"the disk is full: .*out cannot be written"):
        export_run(tmp_path / "run", output=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_command_exports_and_reports(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "run", from_config=LLAMA, steps=(5, 9))
    script = ROOT / "launchers" / "export.py"
    options = ["--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    done = fork_script(tmp_path, script, options).wait()
    assert (done.code, done.stdout) == (0, f"exported to {tmp_path / 'out'}\n"), done.stderr
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trained))
    again = fork_script(tmp_path, script, options).wait()
    assert again.code == 2
    assert again.stderr == (
        f"error: --output: {tmp_path / 'out'} exists and is not an empty directory; give another one\n"
    )
