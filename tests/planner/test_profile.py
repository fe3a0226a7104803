from __future__ import annotations

import json
import logging
import multiprocessing
from dataclasses import replace

import pytest

from framework.errors import UserError
from framework.hardware import DEVICES
from framework.planner.assumptions import workspace_bytes
from framework.planner.drift import KEPT, Drift, drift_path, drift_records, record_drift
from framework.planner.hardware import cpu_device, find_device
from framework.planner.profile import (
    FEW_ROWS,
    FIGURES,
    assumed_profile,
    load_profile,
    profile_for,
    profile_path,
)


@pytest.fixture(autouse=True)
def own_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def measured_profile(device):
    figures = {"workspace_bytes": 123, "matrix_efficiency": {"bfloat16": 0.5}, "network": 2e9}
    profile = assumed_profile(device).with_measured(figures, dict.fromkeys(figures, "measured so"))
    return replace(profile, host="host", versions={"torch": "2.13.0"}, date="2026-01-02T03:04:05+00:00")


def test_every_assumption_has_a_reason():
    for device in (*DEVICES, cpu_device()):
        profile = assumed_profile(device)
        assert set(profile.origins) == set(FIGURES)
        assert all(origin.source and not origin.measured for origin in profile.origins.values())
        assert set(profile.matrix_efficiency) == set(profile.few_rows_efficiency)
        assert ("bfloat16" in profile.matrix_efficiency) == device.bfloat16
        for values in (profile.matrix_efficiency, profile.few_rows_efficiency):
            assert all(0 < value <= 1 for value in values.values())
        assert 0 < profile.attention_efficiency <= 1 and 0 < profile.memory_efficiency <= 1
        assert profile.reserved_ratio >= 1


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("8.0", 8_519_680), ("8.9", 8_519_680), ("9.0", 2**25), ("12.0", 2**25), ("gfx942", 2**27), ("", 0)],
)
def test_workspaces_are_torchs(architecture, size):
    assert workspace_bytes(architecture)[0] == size
    assert find_device("A100").architecture == "8.0"


def test_both_threads_have_a_workspace():
    assert assumed_profile(find_device("A100")).workspace_bytes == 17_039_360


def test_measured_figures_take_the_place_of_assumed_ones():
    assumed = assumed_profile(find_device("A100"))
    profile = measured_profile(find_device("A100"))
    assert profile.workspace_bytes == 123 and profile.measured("workspace_bytes")
    assert profile.matrix_efficiency == {**assumed.matrix_efficiency, "bfloat16": 0.5}
    assert profile.reserved_ratio == assumed.reserved_ratio and not profile.measured("reserved_ratio")
    assert profile.outside_bytes(1) == profile.context_bytes
    assert profile.outside_bytes(2) == profile.context_bytes + profile.communication_bytes


def test_the_efficiency_of_a_product_grows_with_its_rows():
    profile = replace(
        assumed_profile(find_device("A100")), matrix_efficiency={"bfloat16": 0.8}, few_rows_efficiency={"bfloat16": 0.4}
    )
    assert profile.efficiency("bfloat16", FEW_ROWS) == pytest.approx(0.4)
    assert profile.efficiency("bfloat16", 10**12) == pytest.approx(0.8)
    # Time in units of a row at the peak: 2 FEW_ROWS / 0.8 + the fixed FEW_ROWS (1 / 0.4 - 1 / 0.8).
    assert profile.efficiency("bfloat16", 2 * FEW_ROWS) == pytest.approx(2 / (2 / 0.8 + 1 / 0.4 - 1 / 0.8))


def test_a_profile_comes_back_as_it_was_stored(tmp_path):
    profile = measured_profile(find_device("A100"))
    path = profile_path(profile.device, "my host/1")
    assert path == tmp_path / "selectrain" / "machines" / "my_host_1-A100_80GB.json"
    profile.save(path)
    assert load_profile(path) == profile
    replace(profile, context_bytes=7).save(path)
    assert load_profile(path).context_bytes == 7
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_without_a_file_everything_is_assumed():
    device = find_device("A100")
    assert profile_for(device) == assumed_profile(device)
    measured_profile(device).save(profile_path(device.name))
    assert profile_for(device).workspace_bytes == 123


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: "", "cannot be read"),
        (lambda content: json.dumps(content)[:-30], "cannot be read"),
        (lambda content: "[]", "another version's format"),
        (lambda content: json.dumps(content | {"format": 0}), "another version's format"),
        (lambda content: json.dumps({**content, "figures": {}}), "damaged .*context_bytes"),
        (lambda content: _with(content, "reserved_ratio", 0), "damaged .*reserved_ratio is 0"),
        (lambda content: _with(content, "context_bytes", -1), "damaged .*context_bytes is -1"),
        (lambda content: _with(content, "context_bytes", 1.5), "damaged .*context_bytes is 1.5"),
        (lambda content: _with(content, "kernel_seconds", float("nan")), "damaged .*kernel_seconds is nan"),
        (lambda content: _with(content, "matrix_efficiency", {"bfloat16": "fast"}), "damaged .*bfloat16 is 'fast'"),
        (lambda content: _with(content, "all_gather", True), "damaged .*all_gather is True"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_done_without(caplog, change, message):
    device = find_device("A100")
    path = profile_path(device.name)
    measured_profile(device).save(path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(UserError, match=f"(?s)^{path}: .*{message}.*--calibrate"):
        load_profile(path)
    with caplog.at_level(logging.WARNING):
        assert profile_for(device) == assumed_profile(device)
    assert str(path) in caplog.text
    measured_profile(device).save(path)
    assert load_profile(path).workspace_bytes == 123


def _with(content, name, value):
    figures = {**content["figures"], name: {**content["figures"][name], "value": value}}
    return json.dumps({**content, "figures": figures})


def test_a_profile_that_cannot_be_stored_is_the_users_to_know(tmp_path):
    (tmp_path / "selectrain").write_text("a file where the directory should be")
    with pytest.raises(UserError, match="cannot be stored"):
        measured_profile(find_device("A100")).save(profile_path("A100 80GB"))


def drift(number):
    return Drift(f"run {number}", 90, 100, {"torch": "2.13.0"}, "2026-01-02T03:04:05+00:00")


def test_the_newest_drifts_are_kept():
    for number in range(KEPT + 3):
        record_drift("A100 80GB", drift(number))
    records = drift_records("A100 80GB")
    assert records == [drift(number) for number in range(3, KEPT + 3)]
    assert records[0].error == pytest.approx(-0.1)
    assert drift_records("H100") == []


def test_drifts_do_not_end_a_run(tmp_path, caplog):
    path = drift_path("A100 80GB")
    record_drift("A100 80GB", drift(0))
    path.write_text('{"format": 1, "records": [')
    record_drift("A100 80GB", drift(1))
    assert str(path) in caplog.text and drift_records("A100 80GB") == [drift(1)]
    other = tmp_path / "selectrain" / "machines"
    for item in other.iterdir():
        item.unlink()
    other.rmdir()
    other.write_text("a file where the directory should be")
    record_drift("A100 80GB", drift(2))
    assert "cannot be stored" in caplog.text


def record_many(base, start, ready):
    import os

    os.environ["XDG_CONFIG_HOME"] = base
    ready.wait(30)
    for number in range(start, start + 20):
        record_drift("A100 80GB", drift(number), "host")


@pytest.mark.multiprocess
def test_runs_that_record_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(4)
    processes = [context.Process(target=record_many, args=(str(tmp_path), 20 * index, ready)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * 4
    found = {record.config for record in drift_records("A100 80GB", "host")}
    assert found == {f"run {number}" for number in range(80)}
