from __future__ import annotations

import json

import measure_sharding
import pytest
from check_parity import write_data
from measure_sharding import config_of, measure, table
from parity_cases import ENGINES
from several_ranks import run_script_on_ranks

from framework.config import Config
from framework.models import configured_architecture, configured_tokenizer
from framework.training.plan import state_bytes

PRECISION = "fp32_master"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_ranks_hold_what_the_dry_run_says(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_sharding, "launch", run_script_on_ranks(tmp_path / "outputs"))
    write_data(tmp_path)
    found = measure([*ENGINES], 2, tmp_path, PRECISION)
    for engine, held in found.items():
        config = Config.model_validate_json(json.dumps(config_of(engine, tmp_path, 2, PRECISION)))
        architecture = configured_architecture(config, configured_tokenizer(config))
        said = state_bytes(config, architecture.parameters, architecture.trainable_parameters, 2)
        expected = {
            "weights": said["weights"] + said.get("master weights", 0),
            "gradients": said["gradients"],
            "optimizer": said["optimizer state"],
        }
        for kind, size in expected.items():
            # Step counters, rotary tables, and the norms that ZeRO-3 keeps whole.
            assert held[kind] == pytest.approx(size, rel=0.003), (engine, kind)
        assert held["peak"] > sum(expected.values())
    # Hybrid sharding over two ranks is two whole copies.
    assert found["FSDP2"]["optimizer"] == pytest.approx(found["FSDP2 hybrid"]["optimizer"] / 2, rel=0.001)
    assert "| ZeRO 3 | 2 |" in table({2: found}, PRECISION, "command")
