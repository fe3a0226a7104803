"""Measures this machine for the planner, within two minutes."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from framework.hardware import GIGA, TERA, Device
from framework.planner import probes
from framework.planner.hardware import cpu_device, device_of
from framework.planner.profile import FEW_ROWS, Profile, assumed_profile
from framework.planner.stopwatch import Stopwatch
from framework.planner.work import FULL, HALF
from framework.sharding.ranks import Ranks

SECONDS = 120.0

_MEASUREMENTS = 60
"""Into which the time is divided: twice as many as there are, for what goes on before and between them."""

_LAST_START = 0.75
"""Part of the time after which nothing new is begun."""

_LARGER_IS_WORSE = {"context_bytes", "communication_bytes", "workspace_bytes", "reserved_ratio", "kernel_seconds"}


def calibrate(
    device: torch.device,
    ranks: Ranks,
    seconds: float = SECONDS,
    *,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Measure a machine; called by all connected ranks at once, on CUDA in a process that has done nothing else there.

    Every figure is the worst of all ranks, which measure at the same time. What there is no time for stays assumed.

    Args:
        device: of this process.
        ranks: connected ones (`joined_ranks`), or `Ranks()` alone.
        seconds: that it may take.
        say: takes a line for each figure, on the first rank.
        clock: seconds since whenever; replaced in tests.

    Returns:
        The profile, the same on all ranks; `save` stores it.
    """
    kind = described(device)
    run = _Calibration(device, kind, ranks, seconds, say, clock)
    for measure in (run.workspace, run.products, run.attention, run.memory, run.training, run.context, run.links):
        if ranks.max([clock() - run.started])[0] > _LAST_START * seconds:
            run.tell(f"no time is left for: {measure.__name__}; it stays assumed")
        else:
            measure()
    return replace(
        assumed_profile(kind).with_measured(run.agreed(), run.sources),
        host=platform.node(),
        versions=_versions(device),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def described(device: torch.device) -> Device:
    """The device of a process, with the figures that its peak rates come from."""
    if device.type != "cuda":
        return cpu_device()
    properties = torch.cuda.get_device_properties(device)
    return device_of(properties.name, properties.total_memory, f"{properties.major}.{properties.minor}")


class _Calibration:
    """One calibration. Each public method measures some figures."""

    def __init__(
        self,
        device: torch.device,
        kind: Device,
        ranks: Ranks,
        seconds: float,
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.device, self.kind, self.ranks, self.say = device, kind, ranks, say
        self.started = clock()
        self.watch = Stopwatch(device, seconds / _MEASUREMENTS, clock)
        self.figures: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.dtype = "float32" if device.type == "cpu" else "bfloat16" if kind.bfloat16 else "float16"

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def workspace(self) -> None:
        if self.cuda and (size := probes.allocated_workspace(self.device)) > 0:
            self._add("workspace_bytes", size, "allocated after a product's forward and backward pass")
            self.tell(f"cuBLAS workspaces: {size:,} bytes")

    def products(self) -> None:
        large, few, edges = {}, {}, set()
        for dtype in probes.dtypes_of(self.device, self.kind):
            peak = probes.peak_of(self.kind, dtype)
            edge, rate = probes.large_product_rate(self.watch, dtype)
            few_rate = probes.few_rows_rate(self.watch, dtype)
            large[dtype], few[dtype] = rate / peak, few_rate / peak
            edges.add(edge)
            self.tell(
                f"products in {dtype}: {rate / TERA:.3g} TFLOP/s for {edge} rows ({large[dtype]:.0%} of the peak), "
                f"{few_rate / TERA:.3g} for {FEW_ROWS}"
            )
        self._add("matrix_efficiency", large, f"square matrices, edges of {' and '.join(map(str, sorted(edges)))}")
        self._add("few_rows_efficiency", few, f"{FEW_ROWS} rows times a square matrix")

    def attention(self) -> None:
        for name, masked in (("attention_efficiency", False), ("masked_attention_efficiency", True)):
            rate = probes.attention_rate(self.watch, self.dtype, masked=masked)
            efficiency = rate / probes.peak_of(self.kind, self.dtype)
            words = f"{'masked' if masked else 'causal'} attention in {self.dtype}"
            self._add(name, efficiency, f"torch's {words}")
            self.tell(f"{words}: {rate / TERA:.3g} TFLOP/s ({efficiency:.0%} of the peak)")

    def _operators(self, most: float) -> None:
        """What is left of blocks' time without products and attention, for what the others read and write."""
        peak, found = probes.peak_of(self.kind, self.dtype), probes.block_operators(self.watch, self.dtype)
        products = found.products / (peak * self.figures["matrix_efficiency"][self.dtype])
        attention = found.attention / (peak * self.figures["masked_attention_efficiency"])
        traffic = FULL if self.dtype == "float32" else HALF
        moved = found.elements * (traffic.block + traffic.block_backward)
        rate = moved / max(found.seconds - products - attention, moved / most)
        self._add("operator_efficiency", rate / self.kind.memory_bandwidth, "a Llama's blocks, without their products")
        self.tell(f"operators of a block: {rate / GIGA:.4g} GB/s")

    def memory(self) -> None:
        rate, kernel = probes.elementwise_rate(self.watch), probes.kernel_seconds(self.watch)
        to_device, to_host = probes.host_copy_rates(self.watch)
        self._add("memory_efficiency", rate / self.kind.memory_bandwidth, "adding two large tensors into a third")
        self._operators(rate)
        self._add("kernel_seconds", kernel, "the forward pass of a tiny Llama")
        copies = "copies of pinned memory" if self.cuda else "copies within the host's memory"
        self._add("host_to_device", to_device, copies)
        self._add("device_to_host", to_host, copies)
        self.tell(f"device memory: {rate / GIGA:.4g} GB/s; a tiny kernel: {kernel * 1e6:.2g} µs")
        self.tell(f"copies: {to_device / GIGA:.3g} GB/s from the host, {to_host / GIGA:.3g} GB/s to it")

    def training(self) -> None:
        if self.cuda:
            ratio = probes.reserved_ratio(self.device, self.dtype)
            self._add("reserved_ratio", ratio, "a model of 8 blocks, ordinary and token-selective steps, the larger")
            self.tell(f"reserved / allocated: {ratio:.3f}")

    def context(self) -> None:
        if self.cuda:
            size = probes.bytes_outside(self.device)
            self._add("context_bytes", size, "used memory of the device without the allocator's")
            self.tell(f"context: {size:,} bytes, with what other processes have on the device")

    def links(self) -> None:
        if self.ranks.world_size == 1:
            return
        before = probes.bytes_outside(self.device) if self.cuda else 0
        gather, scatter = probes.collective_rates(self.watch, self.ranks)
        machines = self._machines()
        how = f"{self.ranks.world_size} ranks on {machines} machine{'s' if machines > 1 else ''}"
        if machines == 1:
            self._add("all_gather", gather, how)
            self._add("reduce_scatter", scatter, how)
        else:
            self._add("network", min(gather, scatter), how)
        self.tell(f"all-gather: {gather / GIGA:.3g} GB/s, reduce-scatter: {scatter / GIGA:.3g} GB/s, {how}")
        if self.cuda:
            size = max(0, probes.bytes_outside(self.device) - before)
            self._add("communication_bytes", size, f"NCCL's, after both collectives between {how}")
            self.tell(f"communication: {size:,} bytes")

    def tell(self, line: str) -> None:
        """A line for people."""
        if self.ranks.is_first:
            self.say(line)

    def agreed(self) -> dict[str, Any]:
        """The worst of all ranks, of the figures that all have."""
        everyone = self.ranks.gather(self.figures)
        shared = [name for name in self.figures if all(name in figures for figures in everyone)]
        return {name: _worst(name, [figures[name] for figures in everyone]) for name in shared}

    def _add(self, name: str, value: Any, source: str) -> None:
        self.figures[name], self.sources[name] = value, source

    def _machines(self) -> int:
        place = self.ranks.place
        return -(-place.world_size // place.local_world_size)


def _worst(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {key: min(value[key] for value in values) for key in values[0]}
    return max(values) if name in _LARGER_IS_WORSE else min(values)


def _versions(device: torch.device) -> dict[str, str]:
    found = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    if device.type == "cuda" and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
