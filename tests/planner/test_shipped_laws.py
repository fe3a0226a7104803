"""Laws that come with the package: of the pinned libraries, and all that is promised.

That they are as they are recorded now is seen where some are recorded, in `test_extraction.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import record_laws
from record_laws import JOBS, MODELS, Job, configs_of

from framework.config import load_config
from framework.models.configured import base_config
from framework.planner import extraction
from framework.planner.extraction import LIBRARIES, RECORDING, law_key, law_settings
from framework.planner.law import StepLaw
from framework.planner.laws import SHIPPED, shipped_laws
from framework.planner.planning import PlannedJob
from framework.planner.small_models import Family

ROOT = Path(__file__).parents[2]
PINNED = dict(re.findall(r"^([a-z]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of laws are those with the pinned libraries, whichever are installed."""
    monkeypatch.setattr(extraction, "version", lambda name: PINNED[name])


def keys_of(job: Job) -> set[str]:
    configs = [*configs_of(job)]
    family = Family(base_config(configs[0]))
    return {law_key(law_settings(config, family)) for config in configs}


@pytest.mark.usefixtures("pinned")
def test_what_is_shipped_is_what_is_asked_for() -> None:
    asked: dict[str, set[str]] = {}
    for job in JOBS:
        asked.setdefault(MODELS[job.model]["model_type"], set()).update(keys_of(job))
    assert {path.stem for path in SHIPPED.glob("*.zip")} == set(asked)
    for model_type, keys in asked.items():
        assert set(shipped_laws(model_type)) == keys


@pytest.mark.parametrize("model_type", sorted({model["model_type"] for model in MODELS.values()}))
def test_laws_have_the_names_of_their_settings(model_type: str) -> None:
    for key, content in shipped_laws(model_type).items():
        settings: dict[str, Any] = content["settings"]
        assert law_key(settings) == key
        assert settings["recording"] == RECORDING and settings["family"]["model_type"] == model_type
        assert settings["versions"] == {name: PINNED[name] for name in LIBRARIES}
        assert StepLaw.of_json(content["law"]).to_json() == content["law"]


@pytest.mark.usefixtures("pinned")
def test_configs_of_the_repository_need_no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr("framework.planner.laws.run_apart", refuse)
    for name, ranks in (("llama13b.json", 8), ("llama8b-lora.json", 1)):
        job = PlannedJob(load_config(ROOT / "configs" / name), 0.5, lambda line: None)
        space = job.space(ranks, 1)
        assert len(space) > 0 and job.known(space) == space


def test_the_same_laws_are_the_same_bytes(tmp_path: Path) -> None:
    laws = {"b": {"law": 1}, "a": {"law": 2}}
    for path, order in ((tmp_path / "first.zip", "ab"), (tmp_path / "second.zip", "ba")):
        record_laws.write_archive(path, {key: laws[key] for key in order})
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
