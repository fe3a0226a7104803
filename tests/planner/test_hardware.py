from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from framework.config import HardwareConfig
from framework.errors import UserError
from framework.hardware import DEVICES, GIB, known_device
from framework.planner.hardware import (
    NETWORK,
    cluster_of,
    cpu_device,
    device_of,
    find_device,
    host_memory,
    parse_bytes,
    typical_device,
)
from framework.planner.profile import assumed_profile


def nothing():
    return None


def never():
    raise AssertionError("nothing was to be detected")


def test_every_device_has_every_figure():
    for device in DEVICES:
        for item in fields(device):
            value = getattr(device, item.name)
            if item.name not in ("tf32", "seen_bytes", "bfloat16", "ecc", "aliases"):
                assert value, (device.name, item.name)
            if isinstance(value, float):
                assert math.isfinite(value) and value > 0, (device.name, item.name)
        assert 8 * GIB <= device.memory_bytes <= 192 * GIB, device.name
        # A ridge point outside of these would be a mistake of units.
        assert 40 <= device.half / device.memory_bandwidth <= 450, device.name
        assert device.fp32 <= device.half and 16e9 <= device.host_link <= device.peer_link < device.memory_bandwidth
        assert re.fullmatch(r"\d+\.\d|gfx\w+", device.architecture), device.name
        assert (device.tf32 is None) == (not device.bfloat16), device.name


def test_every_name_means_one_device():
    owners = {}
    for device in DEVICES:
        for name in (device.name, *device.aliases):
            plain = re.sub(r"[^a-z0-9]", "", name.lower())
            assert plain not in owners, (device.name, name)
            owners[plain] = device
            assert find_device(name) is device, name
    assert len({device.pattern for device in DEVICES}) == len(DEVICES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("H100", "H100"),
        ("a100", "A100 80GB"),
        ("a100-80gb", "A100 80GB"),
        ("A100_40GB", "A100 40GB"),
        ("A100 PCIe", "A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("4090", "RTX 4090"),
        ("geforce rtx 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("mi300x", "MI300X"),
        ("gh200", "GH200 96GB"),
        ("CPU", "cpu"),
    ],
)
def test_devices_are_found_by_the_drivers_name_and_by_short_ones(name, expected):
    assert find_device(name).name == expected


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UserError, match=r"--device: no device is known as 'H101'; the nearest are H100\b"):
        find_device("H101")
    with pytest.raises(UserError, match=r"hardware\.device: .*the nearest are .*RTX 3090"):
        find_device("RTX 3070", "hardware.device")
    with pytest.raises(UserError, match=r"known are B200, H200, .*MI300X"):
        find_device("zzzzzz")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 * 2**30),
        ("24 GB", 24 * 10**9),
        ("1.5gib", 3 * 2**29),
        (" 512 MiB ", 2**29),
        ("100MB", 10**8),
        ("2TiB", 2**41),
        ("0.1GiB", 107374182),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text, "--gpu-memory") == expected


@pytest.mark.parametrize("text", ["80", "GiB", "80G", "-1GiB", "1e3MB", "80 GiBs", "", "0GiB", "1,5GiB", "nanGB"])
def test_what_is_no_size_names_the_option(text):
    with pytest.raises(UserError, match=r"^--gpu-memory: "):
        parse_bytes(text, "--gpu-memory")


def test_what_programs_see_is_what_torch_reports_within_one_and_a_half_percent():
    # Total capacities in the out-of-memory messages of public issues.
    reported = {"A100": 79.14, "A100 40GB": 39.50, "H100": 79.11, "H200": 139.80, "L40S": 44.39}
    reported |= {"4090": 23.64, "5090": 31.37, "T4": 14.75}
    for name, gib in reported.items():
        assert 0.985 <= find_device(name).visible_bytes / (gib * GIB) <= 1.0005, name


def test_a_budget_is_what_the_user_says():
    hardware = HardwareConfig(nodes=2, gpus_per_node=4, gpu_memory="80GiB")
    cluster = cluster_of(hardware, assumed_profile, detect=never)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.ranks) == (2, 4, 8)
    assert cluster.budget_bytes == 80 * GIB and cluster.device.name == "H100" and cluster.assumed
    assert any(note.startswith("assumed: H100") for note in cluster.notes)
    assert cluster.network == NETWORK
    options = cluster_of(
        hardware, assumed_profile, nodes=1, gpus_per_node=2, gpu_memory="24 GB", network=1e9, detect=never
    )
    assert (options.ranks, options.budget_bytes, options.network) == (2, 24 * 10**9, 1e9)
    assert options.device.name == "RTX 4090" and "budget: 22.4 GiB, as --gpu-memory says" in options.notes


def test_the_budget_of_a_named_device_leaves_out_what_is_not_for_tensors():
    def profile(device):
        return replace(assumed_profile(device), context_bytes=500, communication_bytes=70)

    hardware = HardwareConfig(gpu_memory="16GiB")
    alone = cluster_of(hardware, profile, device="A100-40GB", detect=never)
    assert alone.device is find_device("A100 40GB") and not alone.assumed
    assert alone.budget_bytes == int(40 * GIB * 0.98) - 500
    several = cluster_of(hardware, profile, device="A100-40GB", nodes=2, detect=never)
    assert several.budget_bytes == alone.budget_bytes - 70
    assert cluster_of(hardware, profile, device="A100-40GB", gpu_memory="30GiB").budget_bytes == 30 * GIB


def test_impossible_clusters_are_refused():
    with pytest.raises(UserError, match=r"--gpu-memory: 80GiB is more than one RTX 4090 has \(24.0 GiB\)"):
        cluster_of(HardwareConfig(), assumed_profile, device="4090", gpu_memory="80GiB")

    def greedy(device):
        return replace(assumed_profile(device), context_bytes=17 * GIB)

    with pytest.raises(UserError, match=r"driver and libraries take 17\.0 GiB"):
        cluster_of(HardwareConfig(), greedy, device="T4")


def test_what_is_there_is_taken_where_nothing_is_described():
    found = device_of("NVIDIA H200", 150_000_000_000, "9.0")
    cluster = cluster_of(HardwareConfig(), assumed_profile, detect=lambda: found)
    assert cluster.device.name == "H200" and not cluster.assumed
    assert cluster.budget_bytes == 150_000_000_000 - assumed_profile(found).context_bytes
    without = cluster_of(HardwareConfig(gpus_per_node=2), assumed_profile, detect=nothing)
    assert without.device.name == "cpu"
    assert without.budget_bytes == cpu_device().memory_bytes // 2


def test_an_unknown_device_gets_the_rates_of_a_typical_one_and_says_so():
    device = device_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * GIB, "9.0")
    assert known_device(device.name) is None
    assert (device.visible_bytes, device.half) == (10 * GIB, find_device("T4").half)
    assert device.source.startswith("assumption: the rates of T4")


def test_a_typical_device_has_the_memory():
    expected = {10: "T4", 24: "RTX 4090", 25: "RTX 5090", 40: "A100 40GB", 48: "L40S", 80: "H100", 141: "H200"}
    for gib, name in (expected | {180: "B200", 192: "MI300X", 500: "MI300X"}).items():
        assert typical_device(gib * GIB).name == name


def test_nothing_of_it_imports_torch():
    modules = "hardware, profile, assumptions, drift"
    code = f"import sys\nfrom framework.planner import {modules}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_machines_memory_is_what_its_scheduler_grants(tmp_path):
    whole, limit = host_memory(tmp_path / "none"), tmp_path / "memory.max"
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text, expected in (("max\n", whole), ("1073741824\n", 1 << 30), (f"{whole + 1}\n", whole)):
        limit.write_text(text)
        assert host_memory(limit) == expected
