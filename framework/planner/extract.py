"""Record laws in a process of its own, for `laws_of`, which starts it.

Both files are JSON: the configs of runs by the names of their laws, and for each name its settings and its law, or the
reason why there is none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from framework.config import Config
from framework.errors import UserError
from framework.models.configured import base_config
from framework.planner.extraction import extract_law, law_settings
from framework.planner.fitting import UnknownSizeError
from framework.planner.small_models import Family


def main(request: Path, answer: Path) -> None:
    """Record what the request asks for."""
    found: dict[str, dict[str, Any]] = {}
    for key, values in json.loads(request.read_text(encoding="utf-8")).items():
        config = Config.model_validate_json(json.dumps(values))
        family = Family(base_config(config))
        try:
            found[key] = {"settings": law_settings(config, family), "law": extract_law(config, family).to_json()}
        except (UserError, UnknownSizeError) as error:
            found[key] = {"reason": str(error)}
    answer.write_text(json.dumps(found), encoding="utf-8")
