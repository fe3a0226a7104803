"""Two processes under DistributedDataParallel against the slow reference of one."""

import runpy
from pathlib import Path

import pytest
import several_ranks
import torch
from transformers import DataCollatorForSeq2Seq


def run_step(directory: Path) -> None:
    runpy.run_path(str(Path(__file__).with_name("ddp_step.py")))["main"](directory)


@pytest.mark.multiprocess
def test_a_step_of_two_micro_batches_each(foreign, tiny_tokenizer, tmp_path):
    models = {"full": foreign.tiny_model().train(), "lora": foreign.with_lora(foreign.tiny_model().train())}
    data = [*foreign.tokenized(tiny_tokenizer, 8)]
    collate = DataCollatorForSeq2Seq(tiny_tokenizer, pad_to_multiple_of=8)
    batches = [dict(collate(data[i : i + 2])) for i in range(0, 8, 2)]
    torch.save(models, tmp_path / "models.pt")
    torch.save(batches, tmp_path / "batches.pt")
    several_ranks.run(2, tmp_path, run_step, tmp_path)
    want = {kind: foreign.reference(model, batches) for kind, model in models.items()}
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert len(found) == 12
    errors = {name: foreign.worst(got, want[name.split()[0]]) for name, got in found.items()}
    assert max(errors.values()) < 1e-5, errors
