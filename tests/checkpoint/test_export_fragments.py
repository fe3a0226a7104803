"""Exports of what several ranks saved: those of one rank to the bit, with at most one tensor in memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from framework.checkpoint import CheckpointSaver, StoredFragments, export_run
from framework.checkpoint import export as export_module
from framework.checkpoint.tensor_files import write_assembled, write_tensors
from framework.config import CheckpointConfig, load_config
from framework.errors import RunError
from framework.models import configured_model, load_model
from framework.sharding.fragments import Fragment
from framework.sharding.ranks import Ranks
from framework.sharding.weight_names import saved_tensors

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LORA = {"kind": "lora", "rank": 2, "alpha": 4.0, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
# Takes its start out of the base weights.
PISSA = {"kind": "lora", "rank": 2, "alpha": 4.0, "options": {"init_lora_weights": "pissa"}}
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    model = load_model(path=None, from_config=LLAMA, task="causal_lm", dtype=torch.float32, attention="sdpa", seed=0)
    model.save_pretrained(path)
    return path


@pytest.fixture
def make_run(tmp_path: Path, base: Path, together: Any, parts: Callable[..., list[Fragment]]) -> Callable[..., Any]:
    """A run directory that so many ranks saved, and the trained model."""

    def make_run(name: str, world_size: int, adapter: dict[str, Any] | None = None) -> Any:
        run_dir = tmp_path / name
        values = {
            "run": {"output_dir": str(run_dir), "seed": 3},
            "model": {"path": str(base), "adapter": adapter},
            "data": {"train": "unused.jsonl", "sequence_length": 16},
            "optimizer": {"learning_rate": 0.001},
            "training": {"max_steps": 9, "global_batch_size": 1, "micro_batch_size": 1},
        }
        run_dir.mkdir()
        (run_dir / "config.json").write_text(json.dumps(values))
        trained = configured_model(load_config(run_dir / "config.json"))
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

        def save(ranks: Ranks) -> None:
            weights = parts(saved_tensors(trained), ranks.rank, ranks.world_size)
            saver = CheckpointSaver(run_dir, CheckpointConfig(), ranks)
            saver.save(5, weights=weights, optimizer=[], state={}, manifest={})

        assert together(world_size, save) == [None] * world_size
        return trained.eval()

    return make_run


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.checkpoint.export.configured_tokenizer", lambda config: None)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("adapter", "merge"),
    [(None, False), (LORA, False), (LORA, True), (PISSA, False)],
    ids=["full", "adapter", "merged", "converted adapter"],
)
def test_an_export_is_that_of_one_rank(
    tmp_path: Path, base: Path, make_run: Callable[..., Any], adapter: dict[str, Any] | None, merge: bool
) -> None:
    trained = make_run("one", 1, adapter)
    make_run("several", 3, adapter)
    for name in ("one", "several"):
        export_run(tmp_path / name, output=tmp_path / f"{name}-out", merge_adapter=merge)
    assert files(tmp_path / "one-out") == files(tmp_path / "several-out")
    if adapter is None or merge:
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "several-out")
    else:
        exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "several-out")
    torch.testing.assert_close(logits(exported), logits(trained), rtol=1e-4, atol=1e-4)


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("run", 2)
    before = sorted(tmp_path.iterdir())

    def full(path: Path, stored: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_assembled", full)
    with pytest.raises(RunError, match=r"the disk is full: .*out cannot be written"):
        export_run(tmp_path / "run", output=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


class Counted(StoredFragments):
    """Remembers how many of the tensors that were read were alive at once, at each reading."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "model")
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.at_once: list[int] = []

    def read(self, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        tensor = super().read(name, start, count)
        self.alive = [*(reference for reference in self.alive if reference() is not None), weakref.ref(tensor)]
        self.at_once.append(len(self.alive))
        return tensor


def test_assembling_holds_one_tensor_at_a_time(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    trained = make_run("run", 3)
    stored = Counted(tmp_path / "run" / "checkpoints" / "step-00000005")
    write_assembled(tmp_path / "assembled", stored)
    # One is being written while the next is read.
    assert stored.at_once == [1] * len(saved_tensors(trained))
    write_tensors(tmp_path / "whole", saved_tensors(trained))
    assert (tmp_path / "assembled").read_bytes() == (tmp_path / "whole").read_bytes()
