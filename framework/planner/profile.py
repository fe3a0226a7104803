"""What is known about one machine beyond its devices' datasheet: measured by calibration, or assumed. No torch."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from framework.errors import UserError
from framework.hardware import Device
from framework.planner.assumptions import assumed_figures

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of the stored files. A file of another format is made anew by calibration."""

FEW_ROWS = 128
"""Rows of the narrow products that `few_rows_efficiency` is about."""


@dataclass(frozen=True)
class Origin:
    """Where a figure comes from.

    Attributes:
        measured: on this machine.
        source: how it was measured, or why it is assumed.
    """

    measured: bool
    source: str


@dataclass(frozen=True)
class Profile:
    """Figures of one machine. Efficiencies are achieved rates / the peaks that `framework.hardware` has.

    Attributes:
        device: the name of its devices, as `Device.name`.
        host: name of the machine; empty for assumptions about no particular one.
        context_bytes: device memory of one process besides the allocator's: CUDA's context, and libraries' kernels.
        communication_bytes: the same of the communication library, in processes that have others to talk to.
        workspace_bytes: what cuBLAS has from the allocator in a training process, both threads' handles together.
        reserved_ratio: peak of reserved / peak of allocated bytes.
        matrix_efficiency: of large matrix products, by dtype (`bfloat16`, `float16`, `float32`, `tf32`).
        few_rows_efficiency: of products of `FEW_ROWS` rows with a square weight, by dtype.
        attention_efficiency: of fused attention over long sequences, forward and backward together, in the dtype that
            runs train in.
        masked_attention_efficiency: the same of attention that is given a mask, of which kernels compute all pairs.
        memory_efficiency: bytes a second that elementwise kernels read and write / the memory's bandwidth.
        operator_efficiency: the same of a block's operators that are no products, by what `framework.planner.work` says
            that they read and write.
        kernel_seconds: that the host takes to issue an operator of a block's forward pass.
        host_to_device: bytes a second of copies from pinned memory.
        device_to_host: bytes a second of copies to pinned memory.
        all_gather: within a machine: bytes a second that a rank receives, that is (N - 1) / N of the gathered bytes by
            time.
        reduce_scatter: within a machine: (N - 1) / N of the bytes of a rank's input by time.
        network: between machines: the same (all ranks' slower one), for each machine; None if not measured.
        origins: of the figures, by name.
        versions: of the libraries at the time of the calibration.
        date: of it, ISO 8601.
    """

    device: str
    host: str
    context_bytes: int
    communication_bytes: int
    workspace_bytes: int
    reserved_ratio: float
    matrix_efficiency: Mapping[str, float]
    few_rows_efficiency: Mapping[str, float]
    attention_efficiency: float
    masked_attention_efficiency: float
    memory_efficiency: float
    operator_efficiency: float
    kernel_seconds: float
    host_to_device: float
    device_to_host: float
    all_gather: float
    reduce_scatter: float
    network: float | None
    origins: Mapping[str, Origin]
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    def measured(self, name: str) -> bool:
        """Whether a figure was measured on this machine."""
        return self.origins[name].measured

    def outside_bytes(self, ranks: int) -> int:
        """Device memory of a process that is not the allocator's."""
        return self.context_bytes + (self.communication_bytes if ranks > 1 else 0)

    def efficiency(self, dtype: str, rows: float) -> float:
        """Of the products of a layer: achieved / peak floating-point operations a second.

        The time of a product is taken to be linear in its rows, through `few_rows_efficiency` at `FEW_ROWS` and with
        the slope of `matrix_efficiency`.

        Args:
            dtype: one of those of `matrix_efficiency`.
            rows: of the product's input.
        """
        large, few = self.matrix_efficiency[dtype], self.few_rows_efficiency[dtype]
        fixed = max(0.0, FEW_ROWS * (1 / few - 1 / large))
        return 1 / (1 / large + fixed / max(rows, 1.0))

    def with_measured(self, figures: Mapping[str, Any], sources: Mapping[str, str]) -> Profile:
        """The profile with measured figures in place of what it had.

        Args:
            figures: new values by name; those by dtype replace what they have dtypes for.
            sources: how each was measured.
        """
        merged: dict[str, Any] = {
            name: {**getattr(self, name), **value} if isinstance(value, Mapping) else value
            for name, value in figures.items()
        }
        origins = {**self.origins, **{name: Origin(True, sources[name]) for name in figures}}
        return replace(self, **merged, origins=origins)

    def save(self, path: Path) -> None:
        """Write the file at once, so that whoever reads it meanwhile finds the one before or this one whole.

        Raises:
            UserError: it cannot be written.
        """
        figures = {
            name: {"value": getattr(self, name), "measured": origin.measured, "source": origin.source}
            for name, origin in self.origins.items()
        }
        content = {
            "format": FORMAT,
            "device": self.device,
            "host": self.host,
            "date": self.date,
            "versions": dict(self.versions),
            "figures": figures,
        }
        try:
            replace_file(path, json.dumps(content, indent=2, allow_nan=False))
        except OSError as error:
            raise UserError(f"the profile of this machine cannot be stored: {error}") from error


FIGURES = tuple(
    item.name for item in fields(Profile) if item.name not in ("device", "host", "origins", "versions", "date")
)
"""Names of the figures, in order."""

_BYTES = ("context_bytes", "communication_bytes", "workspace_bytes")
_BY_DTYPE = ("matrix_efficiency", "few_rows_efficiency")


def assumed_profile(device: Device) -> Profile:
    """What is assumed about machines with such a device, with a reason for each figure."""
    assumed = assumed_figures(device)
    origins = {name: Origin(False, source) for name, (_, source) in assumed.items()}
    values: dict[str, Any] = {name: value for name, (value, _) in assumed.items()}
    return Profile(device=device.name, host="", **values, origins=origins)


def figure_lines(profile: Profile) -> list[str]:
    """The figures for people, a line each, with where they come from."""
    lines = []
    for name, origin in profile.origins.items():
        value = getattr(profile, name)
        if isinstance(value, Mapping):
            text = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in value.items())
        else:
            text = "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        source = origin.source if not origin.measured else f"measured: {origin.source}"
        lines.append(f"{name:20} {text}  ({source})")
    return lines


def machines_directory() -> Path:
    """`$XDG_CONFIG_HOME/selectrain/machines`, by default `~/.config/selectrain/machines`."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "selectrain" / "machines"


def profile_path(device: str, host: str | None = None) -> Path:
    """The file of a machine's profile.

    Args:
        device: the name of its devices.
        host: its name; None for this machine.
    """
    return machines_directory() / f"{_safe(host or platform.node())}-{_safe(device)}.json"


def load_profile(path: Path) -> Profile:
    """A stored profile.

    Raises:
        UserError: it cannot be read, is of another format or says what cannot be.
    """
    remedy = "measure anew with python launchers/plan.py --calibrate, or delete the file"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the machine's profile cannot be read ({error}); {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: the machine's profile is of another version's format; {remedy}")
    try:
        return _parsed(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the machine's profile is damaged ({error}); {remedy}") from error


def profile_for(device: Device) -> Profile:
    """This machine's profile for a device: the stored one, else what is assumed.

    A stored one that cannot be used is named in a warning: plans do without it.
    """
    path = profile_path(device.name)
    if not os.path.exists(path):
        return assumed_profile(device)
    try:
        return load_profile(path)
    except UserError as error:
        logger.warning("%s; assumptions take its place", error)
        return assumed_profile(device)


def replace_file(path: Path, text: str) -> None:
    """Write a file under another name, wait until it is on the disk, then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _parsed(content: dict[str, Any]) -> Profile:
    figures = content["figures"]
    values = {name: _checked(name, figures[name]["value"]) for name in FIGURES}
    origins = {name: Origin(bool(figures[name]["measured"]), str(figures[name]["source"])) for name in FIGURES}
    return Profile(
        device=str(content["device"]),
        host=str(content["host"]),
        **values,
        origins=origins,
        versions=dict(content["versions"]),
        date=str(content["date"]),
    )


def _checked(name: str, value: Any) -> Any:
    """A figure that can be, or ValueError."""
    if name in _BY_DTYPE:
        if not isinstance(value, dict) or not value:
            raise ValueError(f"{name} is {value!r}")
        return {str(dtype): _checked(dtype, rate) for dtype, rate in value.items()}
    if name == "network" and value is None:
        return None
    number = isinstance(value, int if name in _BYTES else int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or (value < 0 if name in _BYTES else value <= 0):
        raise ValueError(f"{name} is {value!r}")
    return value


def _safe(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.") or "unknown"
