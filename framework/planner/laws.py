"""Where laws of steps come from: the package, this machine's cache, or a few seconds of recording."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from framework.config import Config
from framework.planner.apart import run_apart
from framework.planner.extraction import law_key, law_settings
from framework.planner.law import StepLaw
from framework.planner.small_models import Family

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "recorded"
"""Laws that come with the package, one file each."""

_CODE = (
    "engine_marks",
    "extraction",
    "fake_ranks",
    "fitting",
    "host_memory",
    "law",
    "marks",
    "naming",
    "recorder",
    "recording",
    "small_models",
    "symbols",
)
"""Modules that decide whether there is a law."""


@dataclass(frozen=True)
class NoLaw:
    """What stands for a law that there is none of; `reason` is for people."""

    reason: str


def laws_of(
    configs: Sequence[Config], family: Family, say: Callable[[str], None], most: int | None = None
) -> list[StepLaw | NoLaw]:
    """The laws of runs of one model that differ in their settings.

    What neither comes with the package nor was recorded on this machine before is recorded now, by a process of its
    own, and kept in `selectrain/laws` of the cache directory. Laws of other versions of the libraries have other names.

    Args:
        configs: of the runs, without open keys.
        family: of their model.
        say: is told what takes time.
        most: laws to record, in the order of the configs; None for no limit. What is beyond it has none for now.

    Raises:
        RunError: recording failed altogether.
    """
    keys = [law_key(law_settings(config, family)) for config in configs]
    found: dict[str, StepLaw | NoLaw] = {}
    missing: dict[str, Config] = {}
    for key, config in zip(keys, configs, strict=True):
        stored = _stored(key)
        if stored is None:
            missing[key] = config
        else:
            found[key] = stored
    later = [] if most is None else [*missing][most:]
    for key in later:
        del missing[key]
        found[key] = NoLaw("what it allocates is not recorded yet")
    if later:
        say(f"{len(later)} settings are left out for lack of time; the same command again looks at more of them")
    if missing:
        settings = f"{len(missing)} settings" if len(missing) > 1 else "one setting"
        say(f"recording once for all models of this family what a step allocates, with {settings}")
        found |= _recorded(missing)
    return [found[key] for key in keys]


def _stored(key: str) -> StepLaw | NoLaw | None:
    for directory in (SHIPPED, _cache()):
        try:
            content = json.loads((directory / f"{key}.json").read_text(encoding="utf-8"))
            if "law" in content:
                return StepLaw.of_json(content["law"])
            if content["code"] == _code_hash():
                return NoLaw(content["reason"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s: cannot be read as a law, recorded anew: %s", directory / f"{key}.json", error)
    return None


@cache
def _code_hash() -> str:
    """Of what decides whether there is a law: that there is none is believed until it changes."""
    modules = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in _CODE)
    return hashlib.sha256(b"".join(modules)).hexdigest()


def _cache() -> Path:
    """`$XDG_CACHE_HOME/selectrain/laws`, by default `~/.cache/selectrain/laws`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "selectrain" / "laws"


def _keep(key: str, content: dict[str, Any]) -> None:
    """Write a law for the next time; a disk that does not take it is no reason to stop."""
    path = _cache() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(content), encoding="utf-8")
        written.replace(path)
    except OSError as error:
        logger.warning("%s: cannot be written: %s", path, error)


def _recorded(missing: dict[str, Config]) -> dict[str, StepLaw | NoLaw]:
    """Record laws in a process of their own."""
    answers = run_apart(
        "framework.planner.extract",
        {key: config.to_json() for key, config in missing.items()},
        failure="the planner cannot record what a step of this model allocates",
    )
    found: dict[str, StepLaw | NoLaw] = {}
    for key, content in answers.items():
        if "law" in content:
            _keep(key, content)
            found[key] = StepLaw.of_json(content["law"])
        else:
            _keep(key, content | {"code": _code_hash()})
            found[key] = NoLaw(content["reason"])
    return found
