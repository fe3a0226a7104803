"""bitsandbytes, an optional package: whether it is here, and its import where something needs it.

Must not import torch.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

from framework.errors import UserError

if TYPE_CHECKING:
    from framework.config import Config

SHARDS_BYTES = (2, 13)
"""The first torch that is known to shard them: see `shards_bytes`."""

_NAME = "bitsandbytes"
# Said at import on CPUs with AVX512-BF16, about a fused product of a later inference: nothing here calls it.
_UNUSED_KERNEL = "Failed to load CPU gemm_4bit_forward"


def check_bitsandbytes(config: Config) -> None:
    """Refuse what needs bitsandbytes where it is not installed, or cannot be sharded. Imports nothing.

    Raises:
        UserError: names the key and what is missing.
    """
    wanted = {
        "model.quantization": config.model.quantization,
        "optimizer.name": config.optimizer.name if config.optimizer.name == "adamw_8bit" else None,
    }
    keys = [f'{key} "{value}"' for key, value in wanted.items() if value is not None]
    if keys and not is_installed():
        raise UserError(
            f"{' and '.join(keys)}: bitsandbytes is not installed here; "
            'pip install "selectrain[quantization]", or set it otherwise'
        )
    if config.model.quantization is not None and config.sharding.engine == "fsdp" and not shards_bytes():
        raise UserError(
            f'model.quantization "{config.model.quantization}" with sharding.engine "fsdp" needs torch '
            f"{'.'.join(map(str, SHARDS_BYTES))}, and here is {version('torch')}: older ones shard floats only "
            "(pytorch/pytorch#177844); use another engine, or a newer torch"
        )


def shards_bytes() -> bool:
    """Whether FSDP2 takes parameters that are no floats, as quantised weights are."""
    return tuple(map(int, version("torch").split(".")[:2])) >= SHARDS_BYTES


def is_installed(name: str | None = None) -> bool:
    """Whether a package, `bitsandbytes` by default, can be imported, or could be if its import were not put off."""
    name = name or _NAME
    return _is_put_off(name) or importlib.util.find_spec(name) is not None


@contextmanager
def put_off_import(name: str) -> Iterator[None]:
    """Within this context a package cannot be imported, as if it were not installed, unless it is already.

    Libraries import some of what they find installed, needed or not: PEFT bitsandbytes, which takes seconds (it loads
    torch's compiler); Accelerate DeepSpeed, which writes to the output. What needs the former calls `bitsandbytes`.
    """
    if name not in sys.modules and importlib.util.find_spec(name) is not None:
        # Python's own way to make an import fail: https://docs.python.org/3/reference/import.html#the-module-cache
        sys.modules[name] = None  # type: ignore[assignment]  # typeshed knows modules only
    try:
        yield
    finally:
        if _is_put_off(name):
            del sys.modules[name]


def bitsandbytes() -> ModuleType:
    """The package, imported on first use."""
    if _is_put_off(_NAME):
        del sys.modules[_NAME]
    logging.getLogger(f"{_NAME}.backends.cpu.ops").addFilter(_is_of_use)
    return import_module(_NAME)


def _is_put_off(name: str) -> bool:
    return sys.modules.get(name, sys) is None


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_UNUSED_KERNEL)
