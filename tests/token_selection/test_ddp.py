"""Two processes under DistributedDataParallel against the slow reference of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

HERE = Path(__file__).parent


@pytest.mark.multiprocess
def test_a_step_of_two_micro_batches_each(foreign, tiny_tokenizer, tmp_path):
    models = {"full": foreign.tiny_model().train(), "lora": foreign.with_lora(foreign.tiny_model().train())}
    data = [*foreign.tokenized(tiny_tokenizer, 8)]
    collate = DataCollatorForSeq2Seq(tiny_tokenizer, pad_to_multiple_of=8)
    batches = [dict(collate(data[i : i + 2])) for i in range(0, 8, 2)]
    torch.save(models, tmp_path / "models.pt")
    torch.save(batches, tmp_path / "batches.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(HERE / "ddp_step.py"), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    want = {kind: foreign.reference(model, batches) for kind, model in models.items()}
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert len(found) == 12
    errors = {name: foreign.worst(got, want[name.split()[0]]) for name, got in found.items()}
    assert max(errors.values()) < 1e-5, errors
