"""The report for bug reports: what it says, and that nothing stops it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import framework
from framework import environment as room
from framework.environment import HIDDEN, environment, main, markdown, shown_variables


def test_what_is_here():
    report = environment()
    assert report["selectrain"]["version"] == framework.__version__
    assert report["python"]["version"] == sys.version.split()[0]
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["packages"]["transformers"] == transformers.__version__
    assert report["torch"]["cuda_available"] == torch.cuda.is_available()
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert "sdpa (math)" in report["torch"]["attention"]
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["system"]["memory_gib"] > 0


def test_secrets_are_not_shown():
    shown = shown_variables(
        {
            "HF_TOKEN": "hf_abc",
            "WANDB_API_KEY": "123",
            "WANDB_BASE_URL": "https://me:pass@wandb.example.org/x",
            "HF_HOME": "/data/hf",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "NCCL_DEBUG": "INFO",
            "SLURM_JOB_ID": "17",
            "SLURM_JWT": "secret",
            "RANK": "3",
            "AWS_SECRET_ACCESS_KEY": "x",
            "HOME": "/root",
            "MY_RANK": "4",
            "HFX": "1",
        }
    )
    assert shown == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HF_HOME": "/data/hf",
        "HF_TOKEN": HIDDEN,
        "NCCL_DEBUG": "INFO",
        "RANK": "3",
        "SLURM_JOB_ID": "17",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_API_KEY": HIDDEN,
        "WANDB_BASE_URL": "https://…@wandb.example.org/x",
    }


def test_the_checkout_that_it_is_imported_from(tmp_path, monkeypatch):
    """With a stand-in for git, which a machine need not have."""
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(f'#!/bin/sh\n[ "$1 $2" = "-C {tmp_path}" ] && cat "{tmp_path}/$3"\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
    (tmp_path / "rev-parse").write_text("0f3a\n")
    (tmp_path / "status").write_text("")
    assert room._git_revision(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert room._git_revision(tmp_path) == "0f3a"
    (tmp_path / "status").write_text(" M file\n")
    assert room._git_revision(tmp_path) == "0f3a with uncommitted changes"
    (tmp_path / "rev-parse").unlink()
    assert room._git_revision(tmp_path) is None


def test_nothing_stops_it(monkeypatch):
    """Neither missing packages, nor a torch that does not load, nor commands that hang."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def broken():
        raise OSError("libcudart.so.13: cannot open shared object file\nsecond line")

    def hang(command, **_):
        raise subprocess.TimeoutExpired(command, 5)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(room, "_torch", broken)
    monkeypatch.setattr(room.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(room.subprocess, "run", hang)
    monkeypatch.setattr(room.Path, "read_text", lambda *_, **__: broken())
    report = environment()
    assert report["packages"] == {} and report["nvidia_smi"] is None
    assert report["torch"] == {"error": "OSError: libcudart.so.13: cannot open shared object file"}
    assert "libcudart.so.13" in markdown(report)


def test_without_torch_it_says_so(monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else plain(name))
    monkeypatch.setattr(room, "_version", lambda package: None)
    report = environment(commands=False)
    assert (report["torch"], report["gpus"]) == ({}, [])
    assert "- **torch**: none found" in markdown(report)


def test_markdown_lists_everything():
    text = markdown(
        {
            "packages": {"torch": "2.13.0", "peft": None},
            "gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.1}] * 2,
            "torch": {"cuda_available": True, "attention": ["sdpa (math)", "sdpa (flash)"]},
            "topology": "     GPU0 GPU1\nGPU0  X   NV18",
            "nvidia_smi": None,
        }
    )
    assert text.splitlines() == [
        "## Environment",
        "",
        "- **packages**",
        "  - torch: 2.13.0",
        "- **gpus**",
        "  - name NVIDIA H100 80GB HBM3, memory_gib 79.1",
        "  - name NVIDIA H100 80GB HBM3, memory_gib 79.1",
        "- **torch**",
        "  - cuda_available: yes",
        "  - attention: sdpa (math), sdpa (flash)",
        "- **topology**",
        "  ```",
        "       GPU0 GPU1",
        "  GPU0  X   NV18",
        "  ```",
        "- **nvidia_smi**: none found",
    ]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["environment", *options])
    assert main() == 0
    printed = capsys.readouterr().out
    if options:
        assert json.loads(printed)["selectrain"]["path"] == str(Path(framework.__file__).parent)
    else:
        assert printed.startswith("## Environment")
