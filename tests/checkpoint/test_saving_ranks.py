"""Saving by several ranks: one checkpoint of all, and an error of one is an error of all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.checkpoint import find_checkpoint, remove_leftovers, save_checkpoint, saving
from framework.checkpoint.stored import rank_file
from framework.checkpoint.tensor_files import write_fragments
from framework.errors import RunError
from framework.sharding.fragments import Fragment
from framework.sharding.ranks import Ranks

Together = Callable[..., list[Any]]
Parts = Callable[..., list[Fragment]]
TENSORS = {"weight": torch.arange(24.0).view(4, 6), "step": torch.tensor(5.0)}


def saving_of(
    run_dir: Path, step: int, parts: Parts, *, before: Callable[[Ranks, Path], None] = lambda *_: None
) -> Callable[[Ranks], Path]:
    """What a rank calls to save `TENSORS` multiplied with the step."""

    def save(ranks: Ranks) -> Path:
        def write_shards(directory: Path) -> list[Path]:
            before(ranks, directory)
            path = directory / rank_file("model", ranks.rank, ranks.world_size)
            held = {name: tensor * step for name, tensor in TENSORS.items()}
            write_fragments(path, parts(held, ranks.rank, ranks.world_size))
            return [path]

        return save_checkpoint(
            run_dir,
            step,
            write_shards=write_shards,
            state={"random": ranks.gather(ranks.rank)},
            manifest={"tokens": step},
            keep_last=1,
            ranks=ranks,
        )

    return save


def test_ranks_save_one_checkpoint(tmp_path: Path, together: Together, parts: Parts, names: Any) -> None:
    for step in (1, 2):
        paths = together(3, saving_of(tmp_path, step, parts))
        assert paths == [tmp_path / "checkpoints" / f"step-{step:08d}"] * 3
    assert names(tmp_path) == ["latest", "step-00000002"]
    found = find_checkpoint(tmp_path)
    assert found is not None and (found.step, found.world_size, found.sequence) == (2, 3, 2)
    assert found.load_state() == {"random": [0, 1, 2]}
    files = {entry["name"]: entry["bytes"] for entry in json.loads((found.path / "manifest.json").read_text())["files"]}
    assert files == {path.name: path.stat().st_size for path in found.path.iterdir() if path.name != "manifest.json"}
    assert list(files) == [*(f"model-{rank:05d}-of-00003.safetensors" for rank in range(3)), "state.pt"]
    stored = found.weights()
    for name, tensor in TENSORS.items():
        assert torch.equal(stored.read(name).view(tensor.shape), tensor * 2)


def test_an_error_of_one_rank_is_one_of_all(tmp_path: Path, together: Together, parts: Parts, names: Any) -> None:
    together(3, saving_of(tmp_path, 1, parts))

    def broken(ranks: Ranks, directory: Path) -> None:
        if ranks.rank == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    results = together(3, saving_of(tmp_path, 2, parts, before=broken))
    message = f"rank 1: cannot save step 2 to {tmp_path / 'checkpoints'}: [Errno 5] Input/output error"
    assert [(type(error), str(error)) for error in results] == [(RunError, message)] * 3
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert isinstance(results[1].__cause__, RunError) and isinstance(results[1].__cause__.__cause__, OSError)


def test_a_full_disk_of_one_rank_is_said_by_all(tmp_path: Path, together: Together, parts: Parts, names: Any) -> None:
    def full(ranks: Ranks, directory: Path) -> None:
        if ranks.rank == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    results = together(3, saving_of(tmp_path, 2, parts, before=full))
    assert len({str(error) for error in results}) == 1
    assert str(results[0]).startswith("rank 2: the disk is full: saving step 2 to ")
    # Known to the rank from the first one, which asked the disk.
    assert " 0 bytes were free" not in str(results[0])
    assert names(tmp_path) == []


def test_a_bug_keeps_its_type_where_it_is_and_has_a_rank_elsewhere(
    tmp_path: Path, together: Together, parts: Parts, names: Any
) -> None:
    def bug(ranks: Ranks, directory: Path) -> None:
        if ranks.rank == 1:
            raise KeyError("bug")

    first, second = together(2, saving_of(tmp_path, 2, parts, before=bug))
    assert isinstance(second, KeyError)
    assert (type(first), str(first)) == (RunError, "rank 1: KeyError('bug')")
    assert names(tmp_path) == []


@pytest.mark.parametrize("function", ["write_state", "write_manifest", "publish"])
def test_an_error_of_the_first_rank_at_the_end_is_one_of_all(
    tmp_path: Path, together: Together, parts: Parts, names: Any, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    together(2, saving_of(tmp_path, 1, parts))
    monkeypatch.setattr(saving, function, broken)
    results = together(2, saving_of(tmp_path, 2, parts))
    assert [type(error) for error in results] == [RunError] * 2
    assert len({str(error) for error in results}) == 1 and str(results[1]).startswith("rank 0: cannot save step 2 to ")
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_a_disk_that_ranks_do_not_share_is_said_before_anything_is_written(
    tmp_path: Path, together: Together, parts: Parts
) -> None:
    written: list[int] = []

    def elsewhere(ranks: Ranks) -> Path:
        save = saving_of(
            tmp_path / str(ranks.rank), 1, parts, before=lambda ranks, directory: written.append(ranks.rank)
        )
        return save(ranks)

    results = together(2, elsewhere)
    expected = (
        f"rank 1: {tmp_path / '1' / 'checkpoints' / '.step-00000001.tmp'} is not there for every rank: "
        "run.output_dir must be on a file system that all machines share"
    )
    assert [(type(error), str(error)) for error in results] == [(RunError, expected)] * 2
    assert not written and list((tmp_path / "0" / "checkpoints").iterdir()) == []


def test_a_file_that_the_first_rank_does_not_see_is_said(
    tmp_path: Path, together: Together, parts: Parts, names: Any
) -> None:
    def elsewhere(ranks: Ranks) -> Path:
        def write_shards(directory: Path) -> list[Path]:
            # What another machine wrote to a disk of its own.
            path = (tmp_path if ranks.rank == 1 else directory) / rank_file("model", ranks.rank, 2)
            write_fragments(path, parts(TENSORS, ranks.rank, 2))
            return [path]

        return save_checkpoint(
            tmp_path / "run", 1, write_shards=write_shards, state={}, manifest={}, keep_last=1, ranks=ranks
        )

    results = together(2, elsewhere)
    message = r"rank 0: .*model-00001-of-00002\.safetensors is not there for every rank: run\.output_dir must be on a"
    for error in results:
        with pytest.raises(RunError, match=message):
            raise error
    assert names(tmp_path / "run") == []


# Exchanges of a save: whether the first rank made the directory, how much is free, whether all see it; then whether all
# wrote their files, which they are, whether the first rank completed the checkpoint. Its state adds one before.
EXCHANGES = 7
FILES_KNOWN = 6


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("exchange", range(1, EXCHANGES + 1))
def test_killed_at_any_exchange_the_last_complete_checkpoint_counts(
    tmp_path: Path,
    together: Together,
    apart: Callable[..., list[int]],
    parts: Parts,
    die: Callable[[], None],
    victim: int,
    moment: str,
    exchange: int,
) -> None:
    together(2, saving_of(tmp_path, 1, parts))

    def deadly(rank: int, number: int, when: str) -> None:
        if (rank, number, when) == (victim, exchange, moment):
            die()

    codes = apart(saving_of(tmp_path, 2, parts), deadly)
    # After the last exchange the other rank has nothing to wait for.
    assert codes[victim] == -9 and codes[1 - victim] == (0 if (exchange, moment) == (EXCHANGES, "after") else 1)
    found = find_checkpoint(tmp_path)
    assert found is not None
    # The first rank goes on alone once it knows the files of all; killed itself, it must have come to the last.
    known = (FILES_KNOWN, "after") if victim == 1 else (EXCHANGES, "before")
    expected = 2 if (exchange, moment) in (known, (EXCHANGES, "before"), (EXCHANGES, "after")) else 1
    assert found.step == expected
    assert torch.equal(found.weights().read("weight").view(4, 6), TENSORS["weight"] * expected)
    remove_leftovers(tmp_path)
    assert [result for result in together(2, saving_of(tmp_path, 3, parts)) if isinstance(result, Exception)] == []
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 3


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_while_writing_its_file_the_last_complete_checkpoint_counts(
    tmp_path: Path,
    together: Together,
    apart: Callable[..., list[int]],
    parts: Parts,
    die: Callable[[], None],
    names: Any,
    victim: int,
) -> None:
    together(2, saving_of(tmp_path, 1, parts))

    def half(ranks: Ranks, directory: Path) -> None:
        if ranks.rank == victim:
            (directory / rank_file("model", ranks.rank, 2)).write_bytes(b"half of it")
            die()

    codes = apart(saving_of(tmp_path, 2, parts, before=half))
    assert codes[victim] == -9 and codes[1 - victim] == 1
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]
