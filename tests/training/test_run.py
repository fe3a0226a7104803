"""How a run that cannot write says so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import framework
from framework.config import Config
from framework.errors import RunError
from framework.training.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("run/config.json", errno.EROFS, r"cannot write to the run directory: .*/run/config.json: Read-only file syst"),
        (".", errno.EACCES, "cannot write to the run directory: .*: Permission denied; set run.output_dir to another"),
        ("run/config.json", errno.ENOSPC, "the disk is full: cannot write to .*/run; free space and start again"),
    ],
)
def test_a_run_directory_that_cannot_be_written_is_an_error_for_people(
    make_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
    message: str,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / name))

    monkeypatch.setattr(RunDirectory, "begin", refuse)
    with pytest.raises(RunError, match=message):
        framework.train(make_config())


def test_an_error_of_another_file_keeps_its_type(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "runner"))

    monkeypatch.setattr(RunDirectory, "begin", refuse)
    with pytest.raises(PermissionError):
        framework.train(make_config())
