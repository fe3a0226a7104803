import json

from framework.checkpoint.layout import checkpoint_name
from framework.checkpoint.publishing import move_latest
from framework.training.run_directory import COMPLETED, FAILED, STOPPED, RunDirectory


def test_markers_are_json_and_cleared_with_the_request_to_stop(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.mark(FAILED, code=1, message="broken", rank=0, last_lines=["a", "b"])
    (directory.path / "STOP").touch()
    assert json.loads((directory.path / "FAILED").read_text()) == {
        "code": 1,
        "message": "broken",
        "cause": None,
        "rank": 0,
        "last_lines": ["a", "b"],
    }
    directory.clear_markers()
    assert list(directory.path.iterdir()) == []
    directory.mark(COMPLETED, code=0, message="", rank=0, last_lines=[])
    assert [path.name for path in directory.path.iterdir()] == ["COMPLETED"]


def test_the_first_marker_is_the_only_one(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.mark(FAILED, code=1, message="broken", rank=1, last_lines=[])
    # What a launcher does to the other ranks then.
    directory.mark(STOPPED, code=0, message="SIGTERM before training started", rank=0, last_lines=[])
    assert [path.name for path in directory.path.iterdir()] == ["FAILED"]
    assert directory.read_marker(FAILED)["message"] == "broken" and directory.read_marker(STOPPED) is None


def test_the_ending_is_the_marker_that_is_there(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    assert directory.ending is None
    directory.mark(STOPPED, code=0, message="stopped after step 3 by STOP", rank=0, last_lines=[], cause="STOP")
    assert directory.ending == "STOPPED" and directory.read_marker(STOPPED)["cause"] == "STOP"


def test_the_latest_step_is_what_the_pointer_says(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.latest_step is None
    directory.checkpoints.mkdir()
    move_latest(directory.checkpoints, checkpoint_name(120))
    assert directory.latest_step == 120


def test_clearing_makes_no_directory(tmp_path):
    RunDirectory(tmp_path / "run").clear_markers()
    assert not (tmp_path / "run").exists()


def make(directory, steps):
    for step in steps:
        (directory.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    directory.metrics.write_text("lines\n")


def test_a_fresh_start_moves_everything_aside(tmp_path):
    directory = RunDirectory(tmp_path)
    make(directory, [10, 20])
    moved = directory.set_aside(after_step=0)
    assert moved == tmp_path / "previous-1"
    assert sorted(path.name for path in (moved / "checkpoints").iterdir()) == ["step-00000010", "step-00000020"]
    assert (moved / "metrics.jsonl").read_text() == "lines\n"
    assert not directory.metrics.exists()
    assert list(directory.checkpoints.iterdir()) == []
    make(directory, [10])
    assert directory.set_aside(after_step=0) == tmp_path / "previous-2"


def test_a_start_from_an_older_step_moves_later_checkpoints_only(tmp_path):
    directory = RunDirectory(tmp_path)
    make(directory, [10, 20])
    moved = directory.set_aside(after_step=10)
    assert [path.name for path in (moved / "checkpoints").iterdir()] == ["step-00000020"]
    assert [path.name for path in directory.checkpoints.iterdir()] == ["step-00000010"]
    assert directory.metrics.exists()


def test_nothing_is_moved_when_the_newest_is_continued(tmp_path):
    directory = RunDirectory(tmp_path)
    make(directory, [10, 20])
    assert directory.set_aside(after_step=20) is None
    assert RunDirectory(tmp_path / "other").set_aside(after_step=0) is None


def test_a_run_holds_its_own_checkpoints_and_no_others(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    make(directory, [10])
    (directory.checkpoints / "latest").symlink_to("step-00000010")
    (tmp_path / "link").symlink_to(directory.path)
    for own in ("run/checkpoints/step-00000010", "run/checkpoints/latest", "link/checkpoints/step-00000010"):
        assert directory.holds(tmp_path / own)
    for other in ("other/checkpoints/step-00000010", "run/previous-1/checkpoints/step-00000010"):
        assert not directory.holds(tmp_path / other)
