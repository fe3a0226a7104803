"""The machines of a launch, the engines that are there, and whether a plan was made for the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from open_job import open_job

from framework.errors import UserError
from framework.planner import launching
from framework.planner.hardware import find_device, host_memory
from framework.planner.launching import engines_here, launch_cluster
from framework.planner.made_for import MadeFor
from framework.planner.planning import budget_of
from framework.planner.profile import assumed_profile

GIB = 1 << 30
A100 = find_device("A100-80GB")


def cluster(gpu_memory=..., found=A100, **places):
    places = {"nodes": 2, "ranks_per_node": 4} | places
    config = open_job(hardware__gpu_memory=None if gpu_memory is ... else gpu_memory)
    return launch_cluster(config, profile_of=assumed_profile, detect=lambda: found, **places)


def test_the_accelerator_that_is_there_is_planned_for():
    whole = cluster()
    assert (whole.nodes, whole.gpus_per_node, whole.ranks, whole.device) == (2, 4, 8, A100)
    assert whole.budget_bytes == A100.visible_bytes - assumed_profile(A100).outside_bytes(8)
    assert not any("as launched" in note for note in whole.notes)
    assert cluster(ranks_per_node=1).notes[0] == "planned for 2 ranks, as launched; hardware describes 8"
    # What is described bounds it, but makes no memory.
    assert cluster("100GiB") == whole
    part = cluster("24GiB")
    assert (part.device, part.budget_bytes) == (A100, 24 * GIB)
    assert part.notes[-1] == "budget: 24.0 GiB, as hardware.gpu_memory says"


def test_what_is_offloaded_has_the_hosts_memory():
    assert cluster().host_bytes == host_memory()
    described = open_job(hardware__host_memory="48GiB")
    found = launch_cluster(described, nodes=2, ranks_per_node=4, profile_of=assumed_profile, detect=lambda: A100)
    assert found.host_bytes == 48 * GIB
    assert budget_of(found, assumed_profile(A100)).host_bytes == 12 * GIB
    assert budget_of(replace(found, host_bytes=None), assumed_profile(A100)).host_bytes is None


def test_without_one_it_is_the_described_one():
    described = cluster("40GiB", found=None)
    assert (described.device.name, described.budget_bytes) == (find_device("A100-40GB").name, 40 * GIB)
    assert described.notes[0] == f"device: none here, so a {described.device.name}, which typically has 40GiB"
    assert "--" not in " ".join(described.notes)
    with pytest.raises(UserError, match=r"^selection\.ratio, .*this machine has none: describe one, as in --set hardw"):
        cluster(found=None)


@pytest.mark.parametrize(
    ("installed", "shards", "expected"),
    [
        (True, True, ("single", "fsdp", "deepspeed")),
        (False, True, ("single", "fsdp")),
        (True, False, ("single", "deepspeed")),
    ],
)
def test_engines_that_cannot_be_had_are_left_out(monkeypatch, installed, shards, expected):
    monkeypatch.setattr(launching, "is_installed", lambda name: installed)
    monkeypatch.setattr(launching, "shards_bytes", lambda: shards)
    adapter = {"kind": "lora", "rank": 2, "alpha": 4.0}
    job = open_job(model__quantization="nf4", model__adapter=adapter, optimizer__precision="pure_bf16")
    assert engines_here(job) == expected
    assert engines_here(open_job()) == (("single", "fsdp", "deepspeed") if installed else ("single", "fsdp"))


def test_a_plan_names_what_it_was_not_made_for():
    first = MadeFor.of(cluster())
    assert first.differences(first) == []
    other = replace(first, ranks=4, budget_bytes=24 * GIB)
    before = f"{first.budget_bytes:,} bytes"
    assert first.differences(other) == ["8 ranks -> 4 ranks", f"{before} -> 25,769,803,776 bytes"]
    assert first.differences(replace(first, nodes=1, device="T4")) == ["2 machines -> 1 machines", f"{A100.name} -> T4"]
