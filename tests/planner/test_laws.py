"""What is kept of laws that were recorded, and of those that there are none of."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from open_job import open_job

from framework.config import Config
from framework.planner import laws
from framework.planner.laws import NoLaw, laws_of

CONFIGS = [open_job(run__seed=seed) for seed in range(3)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[int]]:
    """The seeds of what was recorded, by calls; a recording finds that there is no law."""
    calls: list[list[int]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        request, answer = map(Path, command[-2:])
        asked = json.loads(request.read_text())
        calls.append([config["run"]["seed"] for config in asked.values()])
        answer.write_text(json.dumps({key: {"reason": f"none of {key}"} for key in asked}))
        return subprocess.CompletedProcess(command, 0, "", "")

    def settings(config: Config, family: Any) -> dict[str, Any]:
        return {"seed": config.run.seed}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(laws, "law_settings", settings)
    monkeypatch.setattr(laws, "law_key", lambda settings: f"law-{settings['seed']}")
    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_that_there_is_no_law_is_kept_until_the_code_changes(
    asked: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = SimpleNamespace(model_type="toy")
    expected = [NoLaw("none of law-0"), NoLaw("none of law-1")]
    assert laws_of(CONFIGS[:2], family, lambda line: None) == expected
    assert laws_of(CONFIGS[:2], family, lambda line: None) == expected
    assert asked == [[0, 1]]
    monkeypatch.setattr(laws, "_code_hash", lambda: "another")
    assert laws_of(CONFIGS[:2], family, lambda line: None) == expected
    assert asked == [[0, 1], [0, 1]]


def test_no_more_are_recorded_than_allowed(asked: list[list[int]]) -> None:
    family: Any = SimpleNamespace(model_type="toy")
    said: list[str] = []
    first = laws_of(CONFIGS, family, said.append, most=1)
    assert first[0] == NoLaw("none of law-0") and first[1] == first[2] == NoLaw("what it allocates is not recorded yet")
    assert said[0] == "2 settings are left out for lack of time; the same command again looks at more of them"
    laws_of(CONFIGS, family, said.append, most=1)
    assert laws_of(CONFIGS, family, said.append, most=0)[1] == NoLaw("none of law-1")
    assert asked == [[0], [1]]
