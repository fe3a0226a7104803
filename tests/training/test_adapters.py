"""Whole runs with adapters of several methods: they learn, and a resumed run goes on as if it had not stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import framework
from framework.config import Config
from framework.errors import UserError
from framework.models import configured_model
from framework.training.preview import dry_run

ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"kind": "dora", "rank": 2, "alpha": 4.0, "dropout": 0.1},
    "pissa": {"kind": "lora", "rank": 2, "alpha": 4.0, "options": {"init_lora_weights": "pissa_niter_2"}},
    "ia3": {"kind": "ia3"},
    "loha": {"kind": "loha", "rank": 2, "alpha": 4.0, "options": {"module_dropout": 0.2}},
    "oft": {"kind": "oft", "rank": 2},
    "shira": {"kind": "shira", "rank": 2, "options": {"random_seed": 5}},
    "vera": {"kind": "vera", "rank": 2},
}


@pytest.fixture
def on_base(make_config: Callable[..., Config], settings: dict[str, Any], tmp_path: Path) -> Callable[..., Config]:
    """A config with an adapter on weights from disk, wide enough for an adapter to learn beside random weights."""

    def make(**changes: Any) -> Config:
        wide = {**settings["model"]["from_config"], "hidden_size": 32, "intermediate_size": 48}
        configured_model(make_config(model__from_config=wide)).save_pretrained(tmp_path / "base")
        return make_config(model__path=str(tmp_path / "base"), model__from_config=None, **changes)

    return make


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in ADAPTERS), ("dora", "pure_bf16"), ("oft", "pure_bf16")]
)
def test_adapter_learns_and_resumes(on_base: Callable[..., Config], name: str, precision: str) -> None:
    config = on_base(
        model__adapter=ADAPTERS[name], optimizer__precision=precision, data__eval=None, checkpoint__every_steps=3
    )
    result = framework.train(config)

    def losses() -> list[float]:
        return [json.loads(line)["loss"] for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]

    whole = losses()
    assert "adapter        " in dry_run(config)
    assert whole[-1] < whole[0]
    framework.train(config, resume=str(result.run_dir / "checkpoints" / "step-00000003"))
    assert losses() == whole


def test_another_method_is_another_run(on_base: Callable[..., Config]) -> None:
    config = on_base(model__adapter=ADAPTERS["oft"], training__max_steps=1)
    framework.train(config)
    other = config.model.model_copy(
        update={"adapter": config.model.adapter.model_copy(update={"options": {"coft": True}})}
    )
    with pytest.raises(UserError, match=r"another run .*\n  model\.adapter\.options\.coft: \(absent\) -> true"):
        framework.train(config.model_copy(update={"model": other}))


def test_dry_run_finds_a_misspelt_option(on_base: Callable[..., Config]) -> None:
    config = on_base(model__adapter={"kind": "oft", "rank": 2, "options": {"cofd": True}})
    with pytest.raises(
        UserError, match=r"model\.adapter\.options\.cofd: not an option of OFTConfig; did you mean coft\?"
    ):
        dry_run(config)
