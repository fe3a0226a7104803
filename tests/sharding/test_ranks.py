from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import several_ranks
import torch.distributed as dist

from framework.config import Config
from framework.errors import UserError
from framework.sharding.place import Place, check_ranks
from framework.sharding.ranks import Ranks, is_lost_connection, joined_ranks


def agree(directory: Path) -> None:
    with joined_ranks(Place.of_environment(), timeout_seconds=60) as ranks:
        own = ranks.rank
        assert ranks.sum([1, own + 0.5]) == [3.0, 4.5]
        # Beyond float32, whose next number after 2^24 is 2^24 + 2.
        assert ranks.sum([2**24 + own]) == [3 * 2**24 + 3]
        assert ranks.max([own, -own]) == [2.0, 0.0]
        assert ranks.any(own == 1) and not ranks.any(False)
        assert ranks.gather({"rank": own}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert ranks.broadcast(f"from {own}") == "from 0"
        # Nobody passes before the slowest has come.
        time.sleep(0.4 * own)
        (directory / f"came-{own}").touch()
        ranks.meet()
        assert len([*directory.glob("came-*")]) == 3
        with joined_ranks(Place.of_environment(), timeout_seconds=60) as again:
            assert again.sum([1]) == [3.0]
        assert ranks.sum([1]) == [3.0]
    assert not dist.is_initialized()


@pytest.mark.multiprocess
def test_ranks_agree_on_numbers_flags_and_objects(tmp_path):
    several_ranks.run(3, tmp_path, agree, tmp_path)


def lose_one() -> None:
    try:
        with joined_ranks(Place.of_environment(), timeout_seconds=60) as ranks:
            if ranks.rank == 1:
                raise SystemExit(7)
            ranks.sum([1])
    except RuntimeError as error:
        print("lost" if is_lost_connection(error) else f"unknown: {error!r}")


@pytest.mark.multiprocess
def test_a_rank_that_ends_is_noticed_by_the_others(tmp_path):
    first, second = several_ranks.start(2, tmp_path, lose_one).wait(timeout=30)
    assert second.code == 7
    assert first.stdout.splitlines()[-1] == "lost"


def wait_in_vain() -> None:
    with joined_ranks(Place.of_environment(), timeout_seconds=2) as ranks:
        if ranks.rank == 0:
            try:
                ranks.sum([1])
            except RuntimeError as error:
                print("lost" if is_lost_connection(error) else f"unknown: {error!r}")
                raise SystemExit(0) from error
        time.sleep(15)


@pytest.mark.multiprocess
def test_a_rank_waits_no_longer_than_the_timeout(tmp_path):
    ranks = several_ranks.start(2, tmp_path, wait_in_vain)
    first = ranks.processes[0].wait(timeout=12)
    ranks.kill()
    assert (first.code, first.stdout.splitlines()[-1]) == (0, "lost")


def test_one_process_talks_to_nobody():
    ranks = Ranks()
    assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
    assert (ranks.sum([3, 4]), ranks.max([2]), ranks.gather("a"), ranks.broadcast("b")) == ([3, 4], [2], ["a"], "b")
    assert ranks.any(True) and not ranks.any(False)
    ranks.barrier()
    ranks.meet()


def test_an_engine_that_shards_works_in_one_process_too():
    with joined_ranks(Place(), timeout_seconds=10) as ranks:
        assert dist.get_world_size() == 1 and ranks.sum([5]) == [5]
        # DeepSpeed reads it, and Accelerate would take it for a launch afterwards.
        assert os.environ["LOCAL_RANK"] == "0"
    assert not dist.is_initialized() and "LOCAL_RANK" not in os.environ
    with joined_ranks(Place(), timeout_seconds=10, needed=False) as ranks:
        assert not dist.is_initialized() and ranks.sum([5]) == [5]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0, 1, False)),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Place(5, 8, 1, 4, True)),
        # deepspeed has another name for the processes of a machine
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, Place(5, 8, 1, 4, True)),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, Place(1, 2, 1, 2, True)),
    ],
)
def test_the_place_is_what_launchers_say(environment, place):
    assert Place.of_environment(environment) == place


def config(**sharding) -> Config:
    return Config.model_validate(
        {
            "run": {"output_dir": "run"},
            "model": {"from_config": {"model_type": "llama"}, "tokenizer": "t"},
            "data": {"train": "t.jsonl", "sequence_length": 8},
            "sharding": sharding,
            "optimizer": {"learning_rate": 1e-3},
            "training": {"max_steps": 1, "global_batch_size": 24, "micro_batch_size": 2},
        }
    )


@pytest.mark.parametrize(
    ("sharding", "ranks", "message"),
    [
        ({}, 2, r"sharding\.engine: 'single' runs in one process, but the launcher started 2 \(WORLD_SIZE\); set"),
        (
            {"engine": "fsdp"},
            5,
            r"24 is no multiple of training\.micro_batch_size x ranks = 2 x 5; the nearest are 20 and",
        ),
        ({"engine": "deepspeed"}, 16, r"= 2 x 16; the nearest are 32$"),
        ({"engine": "fsdp", "replicas": 4}, 6, r"sharding\.replicas: 4 copies cannot share 6 ranks evenly"),
    ],
)
def test_ranks_that_a_run_cannot_be_split_over_are_refused(sharding, ranks, message):
    with pytest.raises(UserError, match=message):
        check_ranks(config(**sharding), ranks)


def test_what_is_left_to_the_planner_can_be_anything():
    values = config(engine="fsdp").model_dump(mode="json", exclude_unset=True)
    values["training"]["micro_batch_size"] = "auto"
    values["sharding"]["engine"] = "auto"
    open_run = Config.model_validate(values)
    for ranks in (1, 3, 24):
        check_ranks(open_run, ranks)
    with pytest.raises(UserError, match=r"24 is no multiple of ranks = 5; the nearest are 20 and 25$"):
        check_ranks(open_run, 5)


def test_ranks_that_a_run_can_be_split_over():
    for ranks in (1, 2, 4, 12):
        check_ranks(config(engine="fsdp"), ranks)
        assert config(engine="fsdp").gradient_accumulation(ranks) == 12 // ranks
