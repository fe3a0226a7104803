"""How far predicted peaks were from measured ones, kept for each machine and device. Must not import torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from framework.planner.profile import profile_path, replace_file

logger = logging.getLogger(__name__)

FORMAT = 1

KEPT = 100
"""Records of a machine and device; the oldest make way."""


@dataclass(frozen=True)
class Drift:
    """A run's predicted and measured peak.

    Attributes:
        config: hash of the run's config.
        predicted: bytes of the allocator's peak as planned.
        measured: bytes that it reached.
        versions: of the libraries.
        date: of the run, ISO 8601.
    """

    config: str
    predicted: int
    measured: int
    versions: Mapping[str, str]
    date: str

    @property
    def error(self) -> float:
        """Predicted / measured - 1: negative where the run needed more."""
        return self.predicted / self.measured - 1


def drift_path(device: str, host: str | None = None) -> Path:
    """The file of the records, beside the profile."""
    return profile_path(device, host).with_suffix(".drift.json")


def record_drift(device: str, record: Drift, host: str | None = None) -> None:
    """Add a record. Runs may do so at once; a failure to write is logged, as no run should end for it.

    Args:
        device: the name of its devices, as `Device.name`.
        record: to add.
        host: name of the machine; None for this one.
    """
    path = drift_path(device, host)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            records = [*drift_records(device, host), record][-KEPT:]
            listed = [asdict(item) | {"versions": dict(item.versions)} for item in records]
            replace_file(path, json.dumps({"format": FORMAT, "records": listed}, indent=2))
    except OSError as error:
        logger.warning("the difference between predicted and measured memory cannot be stored: %s", error)


def drift_records(device: str, host: str | None = None) -> list[Drift]:
    """The records of a machine and device, the oldest first; none where there is no file that can be read."""
    path = drift_path(device, host)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return [Drift(**item) for item in content["records"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read and counts as empty: %s", path, error)
        return []


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within this context other processes wait for this one; the lock ends with its process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
