from __future__ import annotations

import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from framework.data import TokenCache, TokenizedDataset, default_cache_directory, load_dataset, loading
from framework.data import cache as cache_module
from framework.errors import UserError

RECORDS = [
    {"text": "abc"},
    {"text": ""},
    {"text": "abcdefghijk"},
    {"text": "de"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


Load = Callable[..., TokenizedDataset]


@pytest.fixture
def load(data: Path, directory: Path, tiny_tokenizer) -> Load:
    """Load the data with the cache, unless another is given."""

    def call(path: Path = data, tokenizer=tiny_tokenizer, cached: bool = True, **options) -> TokenizedDataset:
        cache = TokenCache(directory, tokenizer) if cached else None
        return load_dataset(path, tokenizer=tokenizer, **({"sequence_length": 8} | options), cache=cache)

    return call


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records were labelled, chunk by chunk."""
    counts: list[int] = []
    label_records = loading.label_records

    def counting(format, records, tokenizer, **options):
        counts.append(len(records))
        return label_records(format, records, tokenizer, **options)

    monkeypatch.setattr(loading, "label_records", counting)
    return counts


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_equal(first: TokenizedDataset, second: TokenizedDataset) -> None:
    for name in ("input_ids", "supervised", "offsets", "digests", "contents"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist(), name
    assert first.report == second.report
    assert first.report.summary() == second.report.summary()
    assert (first.name, first.fingerprint) == (second.name, second.fingerprint)


def base_of(array: np.ndarray) -> object:
    while isinstance(array, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_a_second_start_does_not_tokenise(load: Load, labelled: list[int], overlong: str) -> None:
    in_memory = load(overlong=overlong, cached=False)
    first = load(overlong=overlong)
    assert labelled == [4, 4]
    second = load(overlong=overlong)
    assert labelled == [4, 4]
    assert_equal(first, in_memory)
    assert_equal(second, in_memory)
    # What was dropped and cut is known again, and so is what was read.
    report = second.report
    assert (report.records, report.empty, report.longest) == (4, 1, 11)
    assert (report.overlong, report.truncated) == ((1, 0) if overlong == "drop" else (0, 1))
    assert list(report.formats.values()) == ["text"]
    for dataset in (first, second):
        assert isinstance(base_of(dataset.input_ids), mmap.mmap), "pages are shared with other processes"
        assert not dataset.input_ids.flags.writeable
        assert type(dataset.input_ids) is np.ndarray


def test_the_same_content_under_another_name_is_found(
    load: Load, data: Path, labelled: list[int], directory: Path
) -> None:
    load()
    moved = data.rename(data.with_name("moved.jsonl"))
    dataset = load(moved)
    assert labelled == [4]
    assert dataset.report.formats == {str(moved): "text"}
    assert dataset.name == str(moved)
    assert len(entries(directory)) == 1


def change_content(data: Path, **_) -> dict:
    data.write_text(data.read_text().replace("abc", "abd"))
    return {}


def change_template(tokenizer, **_) -> dict:
    tokenizer.chat_template += " "
    return {}


def change_special_token(tokenizer, **_) -> dict:
    tokenizer.eos_token = "<pad>"
    return {}


def add_a_token(tokenizer, **_) -> dict:
    tokenizer.add_tokens(["bc"])
    return {}


def change_code(monkeypatch: pytest.MonkeyPatch, **_) -> dict:
    monkeypatch.setattr(cache_module, "_code_hash", lambda: "of another version")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        change_content,
        change_template,
        change_special_token,
        add_a_token,
        change_code,
        lambda **_: {"sequence_length": 9},
        lambda **_: {"overlong": "truncate"},
        lambda **_: {"format": "text"},
        lambda **_: {"train_on": "last_assistant"},
    ],
    ids=[
        "content",
        "template",
        "special token",
        "added token",
        "code",
        "sequence_length",
        "overlong",
        "format",
        "train_on",
    ],
)
def test_whatever_tokens_depend_on_makes_another_entry(
    load: Load, data: Path, tiny_tokenizer, monkeypatch, labelled: list[int], directory: Path, change: Callable
) -> None:
    load()
    options = change(data=data, tokenizer=tiny_tokenizer, monkeypatch=monkeypatch)
    assert_equal(load(**options), load(**options, cached=False))
    assert labelled == [4, 4, 4]
    assert len(entries(directory)) == 2


def test_using_the_tokenizer_does_not_change_its_entries(load: Load, tiny_tokenizer, labelled: list[int]) -> None:
    load()
    tiny_tokenizer(["abc", "d"], padding=True, truncation=True, max_length=2)
    load()
    assert labelled == [4]


def cut_short(entry: Path) -> None:
    os.truncate(entry / "input_ids.bin", 8)


def flip_a_byte(entry: Path) -> None:
    content = bytearray((entry / "input_ids.bin").read_bytes())
    content[0] ^= 1
    (entry / "input_ids.bin").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        flip_a_byte,
        lambda entry: (entry / "supervised.bin").unlink(),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text("{"),
        lambda entry: (entry / "manifest.json").write_text('{"arrays": {}, "report": {"unknown": 1}}'),
    ],
    ids=["cut short", "another byte", "no array", "no manifest", "half a manifest", "another manifest"],
)
def test_a_damaged_entry_is_made_anew(load: Load, directory: Path, labelled: list[int], caplog, damage) -> None:
    whole = load()
    arrays = whole.input_ids.tolist()
    (entry,) = directory.iterdir()
    os.rename(entry, directory / "copy")  # the mapped files of `whole` are not the ones to damage
    entry.mkdir()
    for file in (directory / "copy").iterdir():
        (entry / file.name).write_bytes(file.read_bytes())
    damage(entry)
    with caplog.at_level(logging.WARNING):
        again = load()
    assert labelled == [4, 4]
    assert str(entry) in caplog.text and "made anew" in caplog.text
    assert again.input_ids.tolist() == arrays
    load()
    assert labelled == [4, 4]
    assert entries(directory) == sorted([entry.name, "copy"])


def test_broken_records_are_never_cached(load: Load, data: Path, directory: Path) -> None:
    whole = data.read_text()
    data.write_text(whole * 600 + '{"text": 1}\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"data\.jsonl:2401: `text` must be a text"):
            load()
        assert entries(directory) == []
    data.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="no label anywhere"):
        load()
    assert entries(directory) == []


def test_an_interrupted_start_leaves_nothing(load: Load, directory: Path, monkeypatch) -> None:
    def interrupt(*_, **__):
        assert len(entries(directory)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "label_records", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert entries(directory) == []


@pytest.mark.parametrize("saved", [False, True], ids=["directory", "save_to_disk"])
def test_data_sets_of_a_directory_are_known_by_their_content(
    load: Load, tmp_path: Path, labelled: list[int], saved: bool
) -> None:
    def make(name: str, *texts: str) -> Path:
        path = tmp_path / name
        if saved:
            datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
        else:
            path.mkdir()
            (path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    first = load(make("first", "abc", "de"))
    assert_equal(load(tmp_path / "first"), first)
    assert labelled == [2]
    other = load(make("second", "abc", "df"))
    assert labelled == [2, 2]
    assert other.input_ids.tolist() != first.input_ids.tolist()


def test_two_that_write_the_same_entry_at_once_do_not_meet(load: Load, directory: Path, tiny_tokenizer) -> None:
    cache = TokenCache(directory, tiny_tokenizer)
    key = cache.key(anything=1)
    ids, supervised = np.array([7, 8], np.int32), np.array([False, True])
    report = loading.DataReport(samples=1)
    with cache.writer(key) as first, cache.writer(key) as second:
        for writer in (first, second):
            writer.add(ids, supervised, digest=2**64 - 1, content=3)
        assert cache.load(key) is None, "not complete"
        assert len(entries(directory)) == 2
        datasets = [first.finish(report), second.finish(report)]
    for dataset in (*datasets, cache.load(key)):
        assert dataset.input_ids.tolist() == [7, 8]
        assert dataset.digests.tolist() == [2**64 - 1]
    assert entries(directory) == [key]


def test_several_threads_load_the_same_data_at_once(load: Load, directory: Path) -> None:
    expected, results = load(cached=False), []
    threads = [threading.Thread(target=lambda: results.append(load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert_equal(result, expected)
    assert len(entries(directory)) == 1


def test_a_cache_that_cannot_be_written_is_done_without(load: Load, directory: Path, caplog) -> None:
    directory.write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        dataset = load()
    assert_equal(dataset, load(cached=False))
    assert f"token cache: {directory} cannot be written, going on without" in caplog.text


def test_a_full_disk_is_done_without(load: Load, directory: Path, monkeypatch, caplog) -> None:
    def full(self, *args, **kwargs):
        raise cache_module.CacheError("No space left on device")

    monkeypatch.setattr(cache_module.CacheWriter, "add", full)
    dataset = load()
    assert_equal(dataset, load(cached=False))
    assert "No space left on device" in caplog.text
    assert entries(directory) == []


def test_a_file_that_changes_while_it_is_read_is_not_cached(
    load: Load, data: Path, directory: Path, monkeypatch, caplog
) -> None:
    label_records, changes = loading.label_records, ['{"text": "xyz"}\n']

    def changing(*args, **options):
        if changes:
            with data.open("a") as file:
                file.write(changes.pop())
        return label_records(*args, **options)

    monkeypatch.setattr(loading, "label_records", changing)
    dataset = load()
    assert len(dataset) == 3 and "was changed while it was read" in caplog.text
    assert entries(directory) == []


def test_what_killed_processes_left_is_removed_after_a_day(load: Load, directory: Path) -> None:
    old, new = directory / ".old.tmp", directory / ".new.tmp"
    for path, age in ((old, 2 * 24 * 3600), (new, 60)):
        path.mkdir(parents=True)
        (path / "input_ids.bin").write_bytes(b"1234")
        os.utime(path / "input_ids.bin", (time.time() - age,) * 2)
    load()
    assert not old.exists() and new.exists()


def test_the_default_directory_honours_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache_directory() == Path("/elsewhere/selectrain/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory() == Path.home() / ".cache/selectrain/tokens"


def test_a_directory_without_permission_to_enter_is_gone_on_without(
    load: Load, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir()
    stat, mkdir = os.stat, os.mkdir

    def denied(call: Callable) -> Callable:
        def guarded(path, *args, **options):
            if Path(os.fsdecode(path)).parent == directory:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **options)

        return guarded

    monkeypatch.setattr(os, "stat", denied(stat))
    monkeypatch.setattr(os, "mkdir", denied(mkdir))
    assert len(load()) == 2
    (record,) = caplog.records
    assert record.getMessage().startswith(f"token cache: {directory} cannot be written, going on without: [Errno 13]")


@pytest.mark.parametrize("cached", [True, False])
def test_an_unreadable_file_is_named(load: Load, data: Path, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    opened = Path.open

    def guarded(path, *args, **options):
        if path == data:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", guarded)
    with pytest.raises(UserError, match=rf"{data}: cannot be read: \[Errno 13\] Permission denied"):
        load(cached=cached)
