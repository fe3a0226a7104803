"""The JSON schema of a config, which editors show."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from framework.config import Config
from framework.config.describe import ELEMENT, known_keys


def printed_schema() -> dict[str, Any]:
    command = [sys.executable, "-m", "framework.config"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_command_prints_the_schema() -> None:
    schema = printed_schema()
    assert schema == Config.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["run", "model", "data", "optimizer", "training"]
    training = schema["$defs"]["TrainingConfig"]
    assert training["required"] == ["global_batch_size", "micro_batch_size"]
    assert training["properties"]["global_batch_size"] == {
        "description": "Sequences per optimiser step.",
        "minimum": 1,
        "title": "Global Batch Size",
        "type": "integer",
    }


def test_every_key_is_described() -> None:
    keys = known_keys(Config.model_json_schema())
    assert ("model", "adapter", "rank") in keys
    assert ("data", "train", "[]", "path") in keys
    sections = [schema for key, schema in keys.items() if "$ref" in schema and key[-1] != ELEMENT]
    assert len(sections) == len(Config.model_fields)
    undescribed = [key for key, schema in keys.items() if "$ref" not in schema and not schema.get("description")]
    assert [key for key in undescribed if key[-1] != ELEMENT] == []
