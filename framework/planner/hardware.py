"""Which machines a plan is for: device, number, budget. Must not import torch, but for finding out what is there."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from framework.config import HardwareConfig
from framework.errors import UserError
from framework.hardware import DEVICES, GIB, GIGA, Device, known_device

if TYPE_CHECKING:
    from framework.planner.profile import Profile

NETWORK = 25 * GIGA
"""Bytes a second and direction between machines, for each, where nothing is said: an assumption, one adapter of
200 Gbit/s. NVIDIA's DGX H100 has eight of 400, a machine on 25 Gbit/s Ethernet an eighth of one."""

CPU = "cpu"

_TYPICAL = ("T4", "RTX 4090", "RTX 5090", "A100 40GB", "L40S", "H100", "H100 NVL", "H200", "B200", "MI300X")
"""What a memory size alone is taken to mean, the smallest that has it; an assumption."""

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*", re.IGNORECASE)
_VENDORS = re.compile(r"nvidia|geforce|tesla|amd|instinct|[^a-z0-9]")
_SUGGESTIONS = 5

# Of one core of a processor with AVX2: two fused multiply-adds of eight float32 a cycle at 2.5 GHz.
_CORE_FLOPS = 80 * GIGA
# Two channels of DDR4-2666 with 8 bytes each.
_CPU_BANDWIDTH = 40 * GIGA


@dataclass(frozen=True)
class Cluster:
    """The machines that a plan is for.

    Attributes:
        nodes: machines.
        gpus_per_node: devices, and so processes, of each.
        device: of which kind; what the rates of a plan come from.
        budget_bytes: device memory that the allocator may take (torch's reserved memory) on each.
        network: between machines, in bytes a second and direction, for each machine.
        host_bytes: memory of each machine for what is offloaded; None for no bound.
        assumed: the kind of device was not given but guessed from the memory.
        notes: what was taken for what and why, one line each.
    """

    nodes: int
    gpus_per_node: int
    device: Device
    budget_bytes: int
    network: float = NETWORK
    host_bytes: int | None = None
    assumed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.nodes * self.gpus_per_node


def parse_bytes(text: str, key: str) -> int:
    """A size such as "80GiB", "24 GB" or "1.5tib"; GB are 10^9 bytes and GiB 2^30.

    Args:
        text: of the size.
        key: option or config key that it was given by, for messages.

    Raises:
        UserError: it is no size, or zero.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UserError(f'{key}: {text!r} is no memory size; give a number and GiB, MiB, GB or MB, such as "80GiB"')
    size = round(float(match[1]) * unit)
    if size <= 0:
        raise UserError(f"{key}: {text!r} is no memory at all")
    return size


def find_device(name: str, key: str = "--device") -> Device:
    """The device that a name means: the driver's, or a short one such as "H100", "a100-80gb", "4090" or "RTX 3090".

    Args:
        name: upper and lower case, spaces, dashes and the vendor's name make no difference; "cpu" is this processor.
        key: option or config key that it was given by, for messages.

    Raises:
        UserError: none has that name; with the nearest ones.
    """
    device = known_device(name)
    if device is not None:
        return device
    wanted = _plain(name)
    if wanted == CPU:
        return cpu_device()
    names = _short_names()
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=_SUGGESTIONS, cutoff=0.5)
    listed = dict.fromkeys(names[found].name for found in near) or [device.name for device in DEVICES]
    raise UserError(
        f"{key}: no device is known as {name!r}; {'the nearest are' if near else 'known are'} {', '.join(listed)}. "
        "For another one, give its memory instead (--gpu-memory)"
    )


def typical_device(memory_bytes: int) -> Device:
    """A widespread device with at least that memory; the one with most, if none has."""
    candidates = sorted((find_device(name) for name in _TYPICAL), key=lambda device: device.memory_bytes)
    return next((device for device in candidates if device.memory_bytes >= memory_bytes), candidates[-1])


def detected_device() -> Device | None:
    """The first accelerator of this machine; None without one. Imports torch.

    One that the table does not have gets the rates of a typical device with its memory; its `source` says so.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return device_of(properties.name, properties.total_memory, f"{properties.major}.{properties.minor}")


def device_of(name: str, visible_bytes: int, architecture: str) -> Device:
    """A device as the driver describes it.

    Args:
        name: of the device.
        visible_bytes: its total memory.
        architecture: its compute capability, such as "8.0".
    """
    known = known_device(name)
    if known is not None:
        return replace(known, seen_bytes=visible_bytes)
    typical = typical_device(visible_bytes)
    return replace(
        typical,
        name=name,
        pattern=re.escape(name),
        memory_bytes=visible_bytes,
        seen_bytes=visible_bytes,
        architecture=architecture,
        source=f"assumption: the rates of {typical.name}, a typical device with this memory",
        aliases=(),
    )


def host_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory of this machine, or what its scheduler grants of it.

    Args:
        limit: file that says the latter, where there is one: https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        granted = limit.read_text(encoding="ascii").strip()
    except OSError:
        return memory
    return min(memory, int(granted)) if granted.isdigit() else memory


def cpu_device() -> Device:
    """This machine's processor as a device, for runs without an accelerator. Its rates are assumptions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops = float(_CORE_FLOPS * len(os.sched_getaffinity(0)))
    return Device(
        name=CPU,
        pattern=CPU,
        memory_bytes=memory,
        memory_bandwidth=_CPU_BANDWIDTH,
        half=flops,
        tf32=None,
        fp32=flops,
        host_link=_CPU_BANDWIDTH,
        peer_link=_CPU_BANDWIDTH,
        architecture="",
        source="assumption: cores with AVX2 at 2.5 GHz, two channels of DDR4-2666",
        seen_bytes=memory,
    )


def cluster_of(
    hardware: HardwareConfig,
    profile_of: Callable[[Device], Profile],
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    gpu_memory: str | None = None,
    device: str | None = None,
    network: float | None = None,
    detect: Callable[[], Device | None] = detected_device,
) -> Cluster:
    """The machines that a config and the options of a command line describe.

    Args:
        hardware: the config's section; the options below override it.
        profile_of: gives a device's profile, for what is not for tensors on it.
        nodes: `--nodes`.
        gpus_per_node: `--gpus-per-node`.
        gpu_memory: `--gpu-memory`, for each device.
        device: `--device`, as `find_device` takes it; it describes other devices than the section's `gpu_memory` does.
        network: bytes a second and direction between machines, for each.
        detect: finds this machine's accelerator; asked if neither device nor memory is described.

    Raises:
        UserError: an unknown device, a size that is none, more memory than the device has, or less than the driver and
            the libraries take.
    """
    nodes, gpus_per_node = nodes or hardware.nodes, gpus_per_node or hardware.gpus_per_node
    key, text = "--gpu-memory", gpu_memory
    if gpu_memory is None and device is None:
        key, text = "hardware.gpu_memory", hardware.gpu_memory
    given = None if text is None else parse_bytes(text, key)
    notes = []
    if device is not None:
        kind = find_device(device)
        if given is not None and given > kind.memory_bytes:
            raise UserError(
                f"{key}: {text} is more than one {kind.name} has ({_gib(kind.memory_bytes)}); leave out one of both"
            )
    elif given is not None:
        kind = typical_device(given)
        notes.append(f"assumed: {kind.name}, a typical device with {text}; --device says which it is")
    else:
        found = detect()
        kind = cpu_device() if found is None else found
        notes.append("device: none found, so this machine's processor" if found is None else f"device: {kind.name}")
    if given is not None:
        budget = given
        notes.append(f"budget: {_gib(budget)}, as {key} says")
        if budget > kind.visible_bytes:
            notes.append(f"of that, programs see about {_gib(kind.visible_bytes)} on one {kind.name}")
    else:
        budget, note = _budget(kind, profile_of(kind), nodes * gpus_per_node, gpus_per_node)
        notes.append(note)
    return Cluster(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        device=kind,
        budget_bytes=budget,
        network=NETWORK if network is None else network,
        host_bytes=None if hardware.host_memory is None else parse_bytes(hardware.host_memory, "hardware.host_memory"),
        assumed=device is None and given is not None,
        notes=tuple(notes),
    )


def _budget(device: Device, profile: Profile, ranks: int, gpus_per_node: int) -> tuple[int, str]:
    """What a device has for the allocator, and why."""
    if device.name == CPU:
        share = device.visible_bytes // gpus_per_node
        shared = f", shared by {gpus_per_node} processes" if gpus_per_node > 1 else ""
        return share, f"budget: {_gib(share)}, the machine's memory{shared}"
    taken = profile.outside_bytes(ranks)
    budget = device.visible_bytes - taken
    if budget <= 0:
        raise UserError(f"{device.name} has {_gib(device.visible_bytes)}, and driver and libraries take {_gib(taken)}")
    libraries = "driver and libraries" if ranks == 1 else "driver, libraries and communication"
    return (
        budget,
        f"budget: {_gib(budget)}, of {_gib(device.visible_bytes)} that programs see {libraries} take the rest",
    )


def _short_names() -> dict[str, Device]:
    """All names, as `_plain` makes them."""
    return {_plain(name): device for device in DEVICES for name in (device.name, *device.aliases)}


def _plain(name: str) -> str:
    """A name without what people write in many ways."""
    return _VENDORS.sub("", name.lower())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
