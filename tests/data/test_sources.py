"""From what `data.train` names to files and splits."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest

from framework.config import SourceConfig
from framework.data.sources import list_parts
from framework.errors import UserError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f'{{"text": "{name}"}}\n')


def table(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


def texts(source: str | SourceConfig, option: str = "data.train") -> dict[str, list[str]]:
    """Name of each part -> its texts."""
    return {str(part): [content["text"] for _, content in part.rows()] for part in list_parts(source, option=option)}


def refused(source: object, option: str = "data.train") -> str:
    with pytest.raises(UserError) as error:
        list_parts(source, option=option)
    return str(error.value)


def test_files_keep_the_order_they_are_named_in() -> None:
    write("b.jsonl", "a.json")
    parts = list_parts(["b.jsonl", Path("a.json"), SourceConfig(path="b.jsonl", weight=2.0)], option="data.train")
    assert [str(part) for part in parts] == ["b.jsonl", "a.json", "b.jsonl"]
    assert [part.source.weight for part in parts] == [None, None, 2.0]
    assert [list(part.rows()) for part in parts] == [
        [("b.jsonl:1", {"text": "b.jsonl"})],
        [("a.json:1", {"text": "a.json"})],
        [("b.jsonl:1", {"text": "b.jsonl"})],
    ]


def test_a_directory_without_splits_is_all_of_its_files() -> None:
    write("data/b.jsonl", "data/a.jsonl", "data/README.md", "data/.hidden.jsonl", "data/state/config.json")
    assert texts("data") == {"data/a.jsonl": ["data/a.jsonl"], "data/b.jsonl": ["data/b.jsonl"]}
    assert list(texts("data", "data.eval")) == ["data/a.jsonl", "data/b.jsonl"]


def test_a_directory_in_the_layout_of_the_hub_has_splits() -> None:
    Path("repo/data").mkdir(parents=True)
    table("a", "b").to_parquet("repo/data/train-00000-of-00002.parquet")
    table("c").to_parquet("repo/data/train-00001-of-00002.parquet")
    table("d").to_parquet("repo/data/test-00000-of-00001.parquet")
    train = {
        "repo/data/train-00000-of-00002.parquet": ["a", "b"],
        "repo/data/train-00001-of-00002.parquet": ["c"],
    }
    assert texts("repo") == texts(SourceConfig(path="repo", split="train"), "data.eval") == train
    assert texts(SourceConfig(path="repo", split="test")) == {"repo/data/test-00000-of-00001.parquet": ["d"]}
    assert texts(SourceConfig(path="repo", split="train[1:]")) == {"repo (train[1:])": ["b", "c"]}
    assert texts(SourceConfig(path="repo", split="train[:1]+test")) == {"repo (train[:1]+test)": ["a", "d"]}
    (part,) = list_parts(SourceConfig(path="repo", split="train[1:]"), option="data.train")
    assert [place for place, _ in part.rows()] == ["repo (train[1:])[0]", "repo (train[1:])[1]"]
    assert refused("repo", "data.eval") == (
        'data.eval: repo has the splits train, test: say which, as {"path": "repo", "split": "test"}'
    )
    assert refused(SourceConfig(path="repo", split="dev")) == (
        "data.train: repo has no split 'dev'; it has train, test"
    )


def test_a_directory_of_json_lines_with_splits() -> None:
    write("data/train.jsonl", "data/test.jsonl")
    assert list(texts("data")) == ["data/train.jsonl"]


def test_subsets_are_those_that_the_card_names() -> None:
    write("repo/a/x.jsonl", "repo/b/y.jsonl")
    Path("repo/README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a/*.jsonl\n- config_name: two\n  data_files: b/*.jsonl\n---\n"
    )
    assert list(texts(SourceConfig(path="repo", subset="two"))) == ["repo/b/y.jsonl"]
    assert "Config name is missing" in refused("repo")
    assert "'three' not found. Available: ['one', 'two']" in refused(SourceConfig(path="repo", subset="three"))


def test_files_that_the_hubs_layout_passes_over_are_not_lost() -> None:
    write("data/train.jsonl", "data/other.jsonl")
    assert "passes over data/other.jsonl: name the files you mean" in refused("data")
    write("mixed/a.jsonl", "mixed/b.jsonl", "mixed/c.csv")
    assert "passes over mixed/c.csv: name the files you mean" in refused("mixed")


def test_what_save_to_disk_wrote() -> None:
    table("a", "b").save_to_disk("one")
    datasets.DatasetDict(train=table("c"), test=table("d")).save_to_disk("several")
    assert texts("one") == {"one": ["a", "b"]}
    assert texts("several") == {"several (train)": ["c"]}
    assert texts(SourceConfig(path="several", split="test"), "data.eval") == {"several (test)": ["d"]}
    assert "has the splits train, test: say which" in refused("several", "data.eval")
    assert "split 'test' has no effect: one has none" in refused(SourceConfig(path="one", split="test"))
    assert "subset 'main' has no effect" in refused(SourceConfig(path="one", subset="main"))


def test_a_directory_named_like_a_builder_is_a_directory() -> None:
    write("json/a.jsonl")
    assert list(texts("json")) == ["json/a.jsonl"]


def test_a_hub_name_without_the_hub_says_what_to_do() -> None:
    message = refused("org/name")
    assert message.startswith("data.train: there is no file or directory 'org/name' here, and the Hugging Face hub")
    assert "hf download --repo-type dataset org/name --local-dir DIR" in message
    assert "\n" not in message


def test_a_hub_name_goes_to_datasets_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, name: str | None, *, split: str | None, revision: str | None) -> datasets.DatasetDict:
        asked.append((path, name, split, revision))
        return datasets.DatasetDict(train=table("a"), test=table("b"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = SourceConfig(path="org/name", subset="main", split="test", revision="v1")
    assert texts(source) == {"org/name (main, test)": ["b"]}
    assert texts("name") == {"name (train)": ["a"]}
    assert asked == [("org/name", "main", None, "v1"), ("name", None, None, None)]


def test_what_cannot_be_opened_is_named_together() -> None:
    write("a.jsonl", "a.md")
    Path("empty").mkdir()
    sources = [
        "none.jsonl",
        "not/even/a-name",
        "a.md",
        "empty",
        SourceConfig(path="a.jsonl", split="train"),
        SourceConfig(path="a.jsonl", revision="main"),
        "a.jsonl",
    ]
    lines = refused(sources, "data.eval").splitlines()
    assert lines[:2] == [
        "data.eval: no such file or directory: none.jsonl",
        "data.eval: no such file or directory: not/even/a-name",
    ]
    assert lines[2].startswith("data.eval: a.md is no kind of file that is read here: .jsonl, ")
    assert lines[3].startswith("data.eval: empty: ") and "doesn't contain any data files" in lines[3]
    assert lines[4:] == [
        "data.eval: split 'train' is of a data set with several, but a.jsonl is one file: leave it out",
        "data.eval: revision 'main' is of a hub name, but a.jsonl is here: leave it out",
    ]
    assert refused([]).startswith("data.train: no data is named")


def test_a_directory_whose_name_is_a_pattern_is_refused() -> None:
    # `datasets` would read x1 in place of it.
    write("x[1]/train.jsonl", "x1/train.jsonl", "parent?/data/train.jsonl")
    assert "data.train: the path " in refused("x[1]") and "x[1] has one of the characters * ? [, by which" in refused(
        "x[1]"
    )
    assert "parent?/data has one of the characters" in refused("parent?/data")
    assert texts("x1") == {"x1/train.jsonl": ["x1/train.jsonl"]}
    assert texts("x[1]/train.jsonl") == {"x[1]/train.jsonl": ["x[1]/train.jsonl"]}
    table("a").save_to_disk("saved[1]")
    assert texts("saved[1]") == {"saved[1]": ["a"]}


@pytest.mark.parametrize("source", ["closed/a.jsonl", "closed"])
def test_a_directory_without_permission_to_enter_is_named(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write("closed/a.jsonl", "open/a.jsonl")
    stat = os.stat

    def guarded(path, *args, **options):
        if "closed/" in os.fsdecode(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", guarded)
    message = refused(source)
    assert message.startswith(f"data.train: {source}: cannot be read: [Errno 13] Permission denied: 'closed/")
    assert refused(["nowhere/a.jsonl", source, "open/a.jsonl"]) == (
        f"data.train: no such file or directory: nowhere/a.jsonl\n{message}"
    )
