"""What a user's own DeepSpeed JSON says beside a run's config. Must not import torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from framework.config import Config
from framework.sharding.deepspeed_keys import (
    OFFLOAD_KEYS,
    PASSED_KEYS,
    PASSED_ZERO_KEYS,
    REFUSED_KEYS,
    REFUSED_OFFLOAD_KEYS,
    REFUSED_ZERO_KEYS,
    RUN_KEYS,
    SIZE_KEYS,
)

AUTO = "auto"
"""Stands for what the run says."""


def merge(options: dict[str, Any], own: dict[str, Any], config: Config) -> Iterator[str]:
    """Take over what the run leaves open.

    Args:
        options: the run's; changed.
        own: a user's.
        config: of the run.

    Yields:
        What is wrong, a line for each key of `own` that contradicts the run, changes what it computes, or is unknown.
    """
    known = [*options, *PASSED_KEYS, *REFUSED_KEYS, "optimizer", "scheduler", "data_types"]
    for key, value in own.items():
        if value == AUTO:
            continue
        if key in REFUSED_KEYS:
            if _is_on(value):
                yield f"{key}: {REFUSED_KEYS[key]}: leave it out"
        elif key == "zero_optimization":
            yield from _merge_zero(options[key], value)
        elif key in ("bf16", "fp16", "data_types"):
            yield from _compare_section(key, value, options.get(key, {}))
        elif key == "optimizer":
            yield from _compare_optimizer(value, config)
        elif key == "scheduler":
            yield from _compare_scheduler(value)
        elif key in RUN_KEYS:
            yield from _compare(key, value, options[key])
        elif key in PASSED_KEYS:
            options[key] = value
        else:
            yield _unknown(key, known)


def _merge_zero(zero: dict[str, Any], own: Any) -> Iterator[str]:
    if not isinstance(own, dict):
        yield f"zero_optimization: an object is needed, not {json.dumps(own)}"
        return
    known = [*zero, *PASSED_ZERO_KEYS, *REFUSED_ZERO_KEYS, *OFFLOAD_KEYS]
    for key, value in own.items():
        name = f"zero_optimization.{key}"
        if value == AUTO:
            continue
        if key == "stage":
            yield from _compare(name, value, zero["stage"])
        elif key in OFFLOAD_KEYS:
            yield from _merge_offload(name, value, zero.get(key))
        elif key in REFUSED_ZERO_KEYS:
            neutral, reason = REFUSED_ZERO_KEYS[key]
            if value not in (neutral, None):
                yield f"{name}: {reason}: leave it out"
        elif key in SIZE_KEYS:
            if not is_count(value):
                yield f"{name}: {json.dumps(value)} is not a number of elements"
            else:
                zero[key] = int(value)
        elif key in PASSED_ZERO_KEYS:
            zero[key] = value
        else:
            yield _unknown(name, [f"zero_optimization.{other}" for other in known])


def _merge_offload(name: str, own: Any, offload: dict[str, Any] | None) -> Iterator[str]:
    own = {} if own is None else own
    if not isinstance(own, dict):
        yield f"{name}: an object is needed, not {json.dumps(own)}"
        return
    run_key = RUN_KEYS[name]
    if own.get("device", AUTO) != AUTO:
        yield from _compare(f"{name}.device", own["device"], "none" if offload is None else offload["device"], run_key)
    for key, value in own.items():
        if key == "device" or value == AUTO:
            continue
        if key in REFUSED_OFFLOAD_KEYS:
            neutral, reason = REFUSED_OFFLOAD_KEYS[key]
            if value not in (neutral, None):
                yield f"{name}.{key}: {reason}: leave it out"
        elif key == "pin_memory":
            if offload is not None:
                offload[key] = value
        else:
            yield _unknown(f"{name}.{key}", [f"{name}.{other}" for other in ("device", "pin_memory")])


def _compare_section(name: str, own: Any, mine: dict[str, Any]) -> Iterator[str]:
    """A section that the run decides; what a disabled one says besides has no effect."""
    if not isinstance(own, dict):
        yield f"{name}: an object is needed, not {json.dumps(own)}"
        return
    if name != "data_types" and own.get("enabled", AUTO) != AUTO:
        yield from _compare(f"{name}.enabled", own["enabled"], mine["enabled"])
    if not mine.get("enabled", True):
        return
    for key, value in own.items():
        if key == "enabled" or value == AUTO:
            continue
        if key in mine:
            yield from _compare(f"{name}.{key}", value, mine[key], RUN_KEYS[name])
        elif value not in (False, None):
            yield f"{name}.{key}: {json.dumps(value)} is not what {RUN_KEYS[name]} means here: leave it out"


def _compare_optimizer(own: Any, config: Config) -> Iterator[str]:
    if not isinstance(own, dict):
        yield f"optimizer: an object is needed, not {json.dumps(own)}"
        return
    settings = config.optimizer
    if str(own.get("type", AUTO)).lower() not in (AUTO, "adamw"):
        yield from _compare("optimizer.type", own["type"], "AdamW")
    mine = {
        "lr": ("optimizer.learning_rate", settings.learning_rate),
        "betas": ("optimizer.betas", [*settings.betas]),
        "eps": ("optimizer.epsilon", settings.epsilon),
        "weight_decay": ("optimizer.weight_decay", settings.weight_decay),
    }
    params = {} if own.get("params") in (None, AUTO) else own["params"]
    if not isinstance(params, dict):
        yield f"optimizer.params: an object is needed, not {json.dumps(params)}"
        return
    for key, value in params.items():
        if value == AUTO or (key in ("adam_w_mode", "torch_adam") and value is True):
            continue
        if key in mine:
            run_key, run_value = mine[key]
            yield from _compare(f"optimizer.params.{key}", value, run_value, run_key)
        else:
            yield f"optimizer.params.{key}: the run's config has no such option: leave it out"
    for key in own:
        if key not in ("type", "params"):
            yield _unknown(f"optimizer.{key}", ["optimizer.type", "optimizer.params"])


def _compare_scheduler(own: Any) -> Iterator[str]:
    params = own.get("params") if isinstance(own, dict) else own
    if isinstance(own, dict) and params in (None, AUTO):
        return
    if not isinstance(params, dict) or any(value != AUTO for value in params.values()):
        yield "scheduler: the run's `schedule` section sets the learning rate of every step: leave it out"


def _compare(name: str, own: Any, mine: Any, run_key: str | None = None) -> Iterator[str]:
    if own != mine or isinstance(own, bool) != isinstance(mine, bool):
        yield (
            f"{name} is {json.dumps(own)}, but {run_key or RUN_KEYS[name]} makes it {json.dumps(mine)}: "
            'leave it out or set it to "auto", or change the run\'s config'
        )


def _is_on(value: Any) -> bool:
    """Whether a section or a switch asks for something."""
    if isinstance(value, dict):
        return bool(value.get("enabled", bool(value)))
    return value not in (False, None, 0)


def is_count(value: Any) -> bool:
    """Whether it is a number of things; in JSON that may be written `5e8`, and `1e999` is infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 0 and (isinstance(value, int) or value.is_integer())


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{name}: unknown to DeepSpeed" + (f'; nearest: "{near[0]}"' if near else "")
