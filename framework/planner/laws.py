"""Where laws of steps come from: the package, this machine's cache, or a few seconds of recording."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from framework.config import Config
from framework.planner.apart import run_apart
from framework.planner.extraction import law_key, law_settings
from framework.planner.law import StepLaw
from framework.planner.small_models import Family

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "recorded"
"""Laws that come with the package: an archive for each type of model, in it a file for each law."""

MOST_PROCESSES = 8
"""That record at a time, each on two of the machine's cores; one has 500 MiB."""

AT_ONCE = 6
"""Laws that a process records at most: it starts as long as it takes for one of them."""

_CODE = (
    "engine_marks",
    "extraction",
    "fake_ranks",
    "fitting",
    "host_memory",
    "known_trials",
    "law",
    "marks",
    "naming",
    "option_marks",
    "options",
    "recorder",
    "recording",
    "small_models",
    "symbols",
    "uncomputed",
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
        stored = _stored(key, family.model_type)
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
        found |= _recorded(missing, say)
    return [found[key] for key in keys]


def _stored(key: str, model_type: str) -> StepLaw | NoLaw | None:
    for text in (_shipped(key, model_type), _cached(key)):
        if text is None:
            continue
        try:
            content = json.loads(text)
            if "law" in content:
                return StepLaw.of_json(content["law"])
            if content["code"] == _code_hash():
                return NoLaw(content["reason"])
        except (ValueError, KeyError) as error:
            logger.warning("%s: cannot be read as a law, recorded anew: %s", _cache() / f"{key}.json", error)
    return None


def _shipped(key: str, model_type: str) -> bytes | None:
    archive = _archive(model_type)
    name = f"{key}.json"
    return archive.read(name) if archive is not None and name in archive.NameToInfo else None


def shipped_laws(model_type: str) -> dict[str, dict[str, Any]]:
    """What comes with the package for a type of model: by the name of each law its settings and itself, as JSON."""
    archive = _archive(model_type)
    if archive is None:
        return {}
    return {name.removesuffix(".json"): json.loads(archive.read(name)) for name in archive.namelist()}


def kept_law(key: str) -> dict[str, Any]:
    """The settings of a law that this machine has recorded, and itself, as JSON."""
    text = _cached(key)
    assert text is not None
    found: dict[str, Any] = json.loads(text)
    return found


@cache
def _archive(model_type: str) -> ZipFile | None:
    path = SHIPPED / f"{model_type}.zip"
    return ZipFile(path) if path.exists() else None


def _cached(key: str) -> bytes | None:
    path = _cache() / f"{key}.json"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: cannot be read, recorded anew: %s", path, error)
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


def _recorded(missing: dict[str, Config], say: Callable[[str], None]) -> dict[str, StepLaw | NoLaw]:
    """Record laws in processes of their own; each is kept when those that were asked for with it are there."""
    processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // 2))
    # As equal as can be, so that none is left to wait for.
    rounds = ceil(len(missing) / (processes * AT_ONCE))
    size = ceil(len(missing) / (processes * rounds))
    keys = [*missing]
    shares = [{key: missing[key] for key in keys[at : at + size]} for at in range(0, len(keys), size)]
    found: dict[str, StepLaw | NoLaw] = {}
    with ThreadPoolExecutor(processes) as pool:
        for done in as_completed([pool.submit(_recorded_apart, share) for share in shares]):
            found |= done.result()
            if len(found) < len(missing):
                say(f"recorded {len(found)} of {len(missing)}")
    return found


def _recorded_apart(missing: dict[str, Config]) -> dict[str, StepLaw | NoLaw]:
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
