"""Reaching the disk for certain, and recognising one that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors' writer and torch's raise their own types, with the system's words or their own in the message.
_FULL_MESSAGES = (
    "No space left on device",
    "Disk quota exceeded",
    "os error 28",
    "os error 122",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
)
_UNITS = ("bytes", "KiB", "MiB", "GiB")


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one that it came from, says that the disk or a quota is full."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if any(message in str(current) for message in _FULL_MESSAGES):
            return True
        current = current.__cause__ or current.__context__
    return False


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def tree_bytes(path: Path) -> int:
    """Bytes of all files under `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def readable_bytes(count: int) -> str:
    """A byte count in the largest binary unit that leaves at least 1: `1.5 GiB`."""
    size = float(count)
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{count} bytes" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
