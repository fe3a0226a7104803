"""Simulate steps in a process of its own, for `checks_of`, which starts it.

Both files are JSON lists: configs with their number of ranks and the labelled share of their data, and what was found,
or the reason why there is nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from framework.config import Config
from framework.errors import UserError
from framework.planner.simulation import simulate


def main(request: Path, answer: Path) -> None:
    """Simulate what the request asks for."""
    found = []
    for asked in json.loads(request.read_text(encoding="utf-8")):
        config = Config.model_validate_json(json.dumps(asked["config"]))
        try:
            found.append(simulate(config, asked["ranks"], asked["labelled_share"]).to_json())
        except UserError as error:
            found.append({"reason": str(error)})
    answer.write_text(json.dumps(found), encoding="utf-8")
