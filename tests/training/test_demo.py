"""The comparison that `make demo` ends with, on a finished run."""

from __future__ import annotations

import demo

import framework
from framework.config import load_config


def test_the_comparison_reads_the_run(write_config, tmp_path, monkeypatch, capsys):
    config = write_config(selection__strategy="supervised", retention__policy="selective", model__attention="sdpa")
    result = framework.train(load_config(config))
    monkeypatch.setattr(demo, "CONFIG", str(config))
    monkeypatch.setattr(demo, "REPEATS", 1)
    better = demo.compare()
    printed = capsys.readouterr().out
    assert f"evaluation loss {result.eval_loss:.3f} nats a token" in printed
    bigram = float(printed.split("bigram model of the same tokens ")[1].split()[0])
    assert better == (result.eval_loss < bigram)
    assert all(policy in printed for policy in ("all", "checkpoint", "selective + retained linears"))
    assert f"The checkpoint is {result.checkpoint}" in printed
